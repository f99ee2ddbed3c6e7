// One answer on the page: who gives it, its text as it comes, how fast it came, or why it did not.

import { element } from "./element.js";
import { bar, percent, routingDetails } from "./routing.js";

export class Answer {
  // `model` is the name that is asked, `pin` the expert it stands for (null: routed), `hues` a number by expert,
  // `retry` what its button does.
  constructor({ model, pin, hues, retry }) {
    this.model = model;
    this.pin = pin;
    this.hues = hues;
    this.who = element("p", "who");
    this.words = element("div", "words");
    this.words.dir = "auto";
    this.end = element("div", "end");
    this.again = element("button", "", "Try again");
    this.again.type = "button";
    this.again.addEventListener("click", retry);
    this.element = element("article", "answer");
    this.head = element("div", "head");
    this.element.append(this.head, this.words, this.end);
    this.begin();
  }

  begin() {
    this.text = "";
    this.firstToken = this.usage = this.reason = null;
    // One node that grows; what a model writes is only ever text.
    this.node = document.createTextNode("");
    this.words.replaceChildren(this.node);
    this.head.replaceChildren(this.who);
    this.end.replaceChildren(element("p", "note", "Waiting for the first token"));
    this.element.classList.add("running");
    this.element.setAttribute("aria-busy", "true");
    this.name(this.pin ?? "…", this.pin === null ? "routing" : "chosen by you");
  }

  // Takes one event of the stream in.
  take(event, now) {
    if (event.routing) this.route(event.routing);
    if (event.usage) this.usage = event.usage;
    const [choice] = event.choices ?? [];
    if (choice?.finish_reason) this.reason = choice.finish_reason;
    const more = choice?.delta?.content;
    if (!more) return;
    this.firstToken ??= now;
    this.lastToken = now;
    this.end.replaceChildren();
    this.text += more;
    this.node.appendData(more);
  }

  route(routing) {
    const { expert, probability, score, threshold } = routing;
    if (this.pin !== null) return;
    if (expert === null) {
      this.name("All experts", routing.decision === "token" ? "mixed token by token" : "mixed layer by layer");
    } else if (threshold !== null && score > threshold) {
      this.name(expert, "answered: unlike all domains");
    } else if (probability === null) {
      this.name(expert, "");
    } else {
      this.name(expert, percent(probability), bar(probability));
    }
    const details = routingDetails(routing, this.hues);
    if (details) this.head.append(details);
  }

  name(expert, about, drawn = "") {
    this.told = about ? `${expert}, ${about}` : expert;
    this.element.dataset.hue = this.hues.get(expert) ?? "none";
    this.who.replaceChildren(element("strong", "", expert), " ", drawn, element("span", "soft", about));
  }

  // The stream is over. Returns what to tell a screen reader.
  finish(sent) {
    this.settle();
    if (!this.text) this.words.replaceChildren(element("span", "soft", "(nothing)"));
    const cut = this.reason === "length" ? ["cut at the longest answer allowed"] : [];
    this.end.replaceChildren(element("p", "note", [...cut, ...this.speed(sent)].join(" · ")));
    return `Answer by ${this.told}: ${this.text || "nothing"}`;
  }

  stop(sent) {
    this.settle();
    const note = element("p", "note", ["stopped", ...this.speed(sent)].join(" · "));
    this.end.replaceChildren(note, this.again);
    return "Stopped.";
  }

  fail(message) {
    this.settle();
    // Nobody gave an answer that there is none of.
    if (!this.text && this.pin === null) this.name("No answer", "");
    const box = element("div", "trouble");
    box.append(element("p", "", message), this.again);
    this.end.replaceChildren(box);
    return message;
  }

  // Once the conversation has gone on, another answer here would change what later ones were given.
  forgetRetry() {
    this.again.remove();
  }

  settle() {
    this.element.classList.remove("running");
    this.element.removeAttribute("aria-busy");
  }

  speed(sent) {
    if (this.firstToken === null) return [];
    const told = [`first token after ${((this.firstToken - sent) / 1000).toFixed(2)} s`];
    const count = this.usage?.completion_tokens;
    if (count) told.push(`${count} ${count === 1 ? "token" : "tokens"}`);
    // The first token's time is told apart, so the rate is that of the others.
    const seconds = (this.lastToken - this.firstToken) / 1000;
    if (count > 1 && seconds > 0) told.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
    return told;
  }
}
