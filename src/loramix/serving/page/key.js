// The key, if the server needs one: asked for in a dialog, and kept for this tab alone.

const NAME = "loramix key";
const dialog = document.getElementById("key-dialog");
const field = document.getElementById("key");
const problem = document.getElementById("key-problem");

let key = null;
try {
  key = sessionStorage.getItem(NAME);
} catch {
  // The browser keeps nothing for pages: the key then lives as long as this one.
}
let asking = null;

document.getElementById("key-cancel").addEventListener("click", () => dialog.close("cancel"));

export function currentKey() {
  return key;
}

// Returns whether a key was given. Two answers that fail together share one dialog.
export function askForKey({ refused }) {
  asking ??= new Promise((resolve) => {
    problem.hidden = !refused;
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      const given = dialog.returnValue === "use";
      if (given) keep(field.value.trim());
      field.value = "";
      asking = null;
      resolve(given);
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

function keep(value) {
  key = value;
  try {
    sessionStorage.setItem(NAME, value);
  } catch {
    // See above.
  }
}
