// Talks to the server this page came from.

import { askForKey, currentKey } from "./key.js";

// What went wrong, in words for the reader.
export class Failure extends Error {}

// Sends a request, asking for the key where one is needed. Returns the response and when it was sent.
export async function request(path, { body, signal } = {}) {
  for (;;) {
    const key = currentKey();
    const sent = performance.now();
    const response = await send(path, body, signal, key);
    if (response.ok) return { response, sent };
    if (response.status !== 401) throw new Failure(await inPlainWords(response));
    // Unless another request has asked for the key meanwhile.
    if (key === currentKey() && !(await askForKey({ refused: key !== null }))) {
      throw new Failure("This server needs a key, and none was given.");
    }
  }
}

async function send(path, body, signal, key) {
  const headers = { Accept: "application/json, text/event-stream" };
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  // With a key of our own, the browser is to leave out its own login, and not to ask for one when the key is refused.
  const credentials = key === null ? "same-origin" : "omit";
  const method = body === undefined ? "GET" : "POST";
  try {
    // The location leaves a login in the page's address out; a path alone would take it along, and be refused.
    return await fetch(new URL(path, location.href), { method, headers, credentials, signal, body: JSON.stringify(body) });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Failure("The server cannot be reached. See whether it still runs.");
  }
}

async function inPlainWords(response) {
  const said = await response.json().then((content) => content.error.message, () => "It did not say why.");
  const { status } = response;
  const seconds = Number(response.headers.get("Retry-After"));
  if (status === 429 || seconds > 0) {
    const when = seconds > 0 ? `in ${seconds} ${seconds === 1 ? "second" : "seconds"}` : "in a moment";
    return `The server is busy. Try again ${when}.`;
  }
  if (status === 413) return "This conversation is too long to send. Start a new one.";
  if (status === 408 || status === 504) return `This took too long. ${said}`;
  if (status >= 500) return `The server failed. ${said}`;
  return `The server refused this. ${said}`;
}

// Yields the events of a stream, each parsed, until the server says that it is done.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { done, value } = await reader.read().catch(() => ({ done: true }));
    if (done) throw new Failure("The answer broke off: the connection was lost.");
    const parts = (left + value).split("\n\n");
    left = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(`The answer broke off. ${event.error.message}`);
      yield event;
    }
  }
}
