"""200 names that are paths, or mean to be."""

from __future__ import annotations

UP = ("..", "../x", "../../x", "../../../etc/passwd", "a/../../x", "./x", "x/y", "x/", "/", "/x", "//x", "/etc/passwd")
WINDOWS = ("..\\x", "..\\..\\x", "C:\\x", "C:x", "\\\\server\\share", "a\\b", "CON", "NUL", "x:stream", "\\", "\\x")
ENCODED = ("%2e%2e", "%2e%2e%2fx", "..%2fx", "%2fx", "..%5cx", "%252e%252e%252fx", "..%c0%afx", "%00", "x%00.y", "%2e")
OTHER = ("~", "~root", "~/x", "$HOME", "${HOME}/x", "`id`", "$(id)", ";id", "|id", "&id", "*", "?", "[a]", "{a,b}")
ODD = ("", " ", ".", "...", ". .", "-", "-rf", "--help", "x\0y", "\0", "x\ny", "\n", "\t", "x\r", "x ", " x", "a" * 300)
UNICODE = (
    "\u2024\u2024/x",
    "\uff0e\uff0e/x",
    "x\uff0fy",
    "x\u2215y",
    "\u202e../x",
    "\ufeff../x",
    "\u200b",
    "..\u2215x",
    "\u2024\u2024",
    "é/../x",
)
URLS = ("file:///etc/passwd", "http://x/y", "hf://x/y", "s3://x/y", "git+ssh://x", "data:,x", "//x/y", "\\\\?\\C:\\x")
WRAPS = ("{}", "x{}", "{}x", "a/{}")


def path_names() -> list[str]:
    """Returns them: each alone, then with something before, behind and above, until there are 200."""
    plain = [*UP, *WINDOWS, *ENCODED, *OTHER, *ODD, *UNICODE, *URLS]
    found = dict.fromkeys(wrap.format(name) if "{" not in name else name for wrap in WRAPS for name in plain)
    return list(found)[:200]
