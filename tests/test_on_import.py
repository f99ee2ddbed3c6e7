"""What happens when loramix is imported: nothing outside it."""

from __future__ import annotations

import subprocess
import sys

ALL = """
import importlib, pkgutil, socket, sys

def refused(*args, **kwargs):
    raise AssertionError(f"a socket at import: {args}")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refused
import loramix

names = [found.name for found in pkgutil.walk_packages(loramix.__path__, "loramix.") if "__main__" not in found.name]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_no_module_reaches_out_when_it_is_imported():
    done = subprocess.run([sys.executable, "-c", ALL], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 150
