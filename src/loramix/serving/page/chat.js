// The chat page: what is asked, of whom, and the conversation so far.

import { Answer } from "./answer.js";
import { Failure, events, request } from "./api.js";
import { element } from "./element.js";
import { askForKey, currentKey } from "./key.js";

const at = (id) => document.getElementById(id);
const [first, second, compare, composer, message, log] =
  ["first", "second", "compare", "composer", "message", "log"].map(at);

// A turn is one message and its answers: one, or two side by side.
let turns = [];
let models = [];
const hues = new Map();
const running = new Set();

// ---- who can answer ----------------------------------------------------------------------------------------------

async function loadModels() {
  at("trouble").hidden = true;
  try {
    const { response } = await request("v1/models");
    models = (await response.json()).data;
    showModels();
  } catch (error) {
    at("trouble-text").textContent = inWords(error);
    at("trouble").hidden = false;
    tell(inWords(error));
  }
  at("another-key").hidden = currentKey() === null;
}

function showModels() {
  const pins = models.filter((model) => model.parent !== null);
  hues.clear();
  pins.forEach((model, n) => hues.set(pinOf(model), model.kind === "base" ? "base" : n % 10));
  const mixture = models.find((model) => model.kind === "mixture");
  at("name").textContent = mixture?.id ?? "";
  at("experts").replaceChildren(...pins.map((model) => {
    const name = element("li", "", model.kind === "base" ? "base (no expert)" : pinOf(model));
    name.dataset.hue = hues.get(pinOf(model));
    return name;
  }));
  const [mixtureText, about] = models.some((model) => model.kind === "expert")
    ? ["the expert that fits", "Each answer says which expert gave it."]
    : ["all experts together", "All experts answer together, mixed token by token."];
  at("lead").textContent = `Ask something. ${about}`;
  const base = pins.find((model) => model.kind === "base");
  fill(first, mixtureText, models[0]?.id);
  fill(second, mixtureText, (base ?? pins[0] ?? models[0])?.id);
}

// The base is a pin too: "demo:base".
function pinOf(model) {
  return model.parent === null ? null : model.id.slice(model.parent.length + 1);
}

function fill(select, mixtureText, preferred) {
  const before = select.value;
  const kinds = { mixture: "The mixture", expert: "One expert", base: "No expert" };
  const groups = Object.entries(kinds).map(([kind, label]) => {
    const group = element("optgroup");
    group.label = label;
    group.append(...models.filter((model) => model.kind === kind)
      .map((model) => new Option(pinOf(model) ?? mixtureText, model.id)));
    return group;
  });
  select.replaceChildren(...groups.filter((group) => group.childElementCount));
  select.value = models.some((model) => model.id === before) ? before : preferred;
  select.disabled = false;
}

// ---- asking ------------------------------------------------------------------------------------------------------

function send() {
  const question = message.value.trim();
  if (!question) return;
  if (running.size) return tell("An answer is still being written. Escape stops it.");
  if (first.disabled) return tell("The server has not said yet who can answer.");
  if (!composer.checkValidity()) {
    at("settings").open = true; // What is closed cannot be pointed at.
    composer.reportValidity();
    return;
  }
  turns.at(-1)?.answers.forEach((answer) => answer.forgetRetry());
  const turn = { question, answers: [] };
  const chosen = compare.checked ? [first.value, second.value] : [first.value];
  turn.answers = chosen.map((id, side) => {
    const pin = pinOf(models.find((model) => model.id === id));
    return new Answer({ model: id, pin, hues, retry: () => { message.focus(); run(turn, side); } });
  });
  turns.push(turn);
  show(turn);
  message.value = "";
  message.focus(); // The send button goes, and would take the focus with it.
  at("told").replaceChildren();
  tell("Sent. Waiting for the answer.");
  turn.answers.forEach((_, side) => run(turn, side));
}

function show(turn) {
  at("welcome").hidden = true;
  const asked = element("div", "question");
  asked.dir = "auto";
  asked.append(element("h3", "unseen", "You"), element("p", "words", turn.question));
  const answers = element("div", "answers");
  answers.setAttribute("aria-live", "off"); // Told once whole, not token by token.
  turn.answers.forEach((answer, side) => {
    const name = turn.answers.length > 1 ? `Answer ${side + 1} of 2` : "Answer";
    answer.element.setAttribute("aria-label", name);
    answers.append(answer.element);
  });
  const section = element("section", "turn");
  section.append(asked, answers);
  log.append(section);
  window.scrollTo(0, document.body.scrollHeight);
}

// Each side is sent its own earlier answers, and the first side's where it gave none. Turns without an answer are
// left out: most chat templates want question and answer to alternate.
function messagesFor(turn, side) {
  const messages = turns.slice(0, turns.indexOf(turn)).flatMap(({ question, answers }) => {
    const { text } = answers[side] ?? answers[0];
    return text ? [{ role: "user", content: question }, { role: "assistant", content: text }] : [];
  });
  return [...messages, { role: "user", content: turn.question }];
}

async function run(turn, side) {
  const answer = turn.answers[side];
  const controller = new AbortController();
  const { signal } = controller;
  running.add(controller);
  showRunning();
  answer.begin();
  const body = {
    model: answer.model,
    messages: messagesFor(turn, side),
    stream: true,
    stream_options: { include_usage: true },
    max_tokens: at("tokens").valueAsNumber,
    temperature: at("temperature").valueAsNumber,
  };
  let sent = null;
  let told = "";
  try {
    const begun = await request("v1/chat/completions", { body, signal });
    sent = begun.sent;
    for await (const event of events(begun.response)) {
      following(() => answer.take(event, performance.now()));
    }
    following(() => { told = answer.finish(sent); });
  } catch (error) {
    following(() => { told = signal.aborted ? answer.stop(sent) : answer.fail(inWords(error)); });
  }
  running.delete(controller);
  showRunning();
  // A new conversation may have begun meanwhile.
  if (turns.includes(turn)) tell(told);
}

function stop() {
  running.forEach((controller) => controller.abort());
}

function showRunning() {
  const stopHadFocus = document.activeElement === at("stop");
  at("send").hidden = running.size > 0;
  at("stop").hidden = running.size === 0;
  if (stopHadFocus && running.size === 0) message.focus();
}

function startAnew() {
  turns = [];
  stop();
  log.replaceChildren();
  at("welcome").hidden = false;
  at("told").replaceChildren();
  tell("New conversation.");
  message.focus();
}

function inWords(error) {
  if (error instanceof Failure) return error.message;
  console.error(error);
  return "This page made a mistake. The browser's console says more.";
}

// ---- showing and telling -----------------------------------------------------------------------------------------

// Makes a change, and stays at the end of the page if that is where the reader was.
function following(change) {
  const root = document.documentElement;
  const atEnd = root.scrollHeight - root.clientHeight - window.scrollY < 40;
  change();
  if (atEnd) window.scrollTo(0, root.scrollHeight);
}

// Told as additions: two that come together are both read, and so is the same one twice.
function tell(text) {
  at("told").append(element("p", "", text));
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
message.addEventListener("keydown", (event) => {
  // While a word is being composed (Chinese, Japanese), Enter ends the word.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !at("key-dialog").open) stop();
});
compare.addEventListener("change", () => {
  at("second-choice").hidden = !compare.checked;
  document.body.classList.toggle("comparing", compare.checked);
});
at("stop").addEventListener("click", stop);
at("new").addEventListener("click", startAnew);
at("reload").addEventListener("click", loadModels);
at("another-key").addEventListener("click", async () => {
  if (await askForKey({ refused: false })) loadModels();
});
loadModels();
message.focus();
