// Why an expert answered: all probabilities, and how far the prompt is from all domains.

import { element } from "./element.js";

const SVG = "http://www.w3.org/2000/svg";
const DECISIONS = {
  last: "The router of the last layer decided.",
  vote: "The routers of all layers voted.",
  per_layer: "Each layer decided by itself.",
};

export function percent(probability) {
  if (probability > 0.99 && probability < 1) return "over 99 %";
  if (probability < 0.01 && probability > 0) return "under 1 %";
  return `${Math.round(probability * 100)} %`;
}

// Returns a disclosure, or null where nothing was compared.
export function routingDetails({ decision, probabilities, score, threshold }, hues) {
  const ranked = Object.entries(probabilities).sort((one, other) => other[1] - one[1]);
  if (!ranked.length) return null;
  const details = element("details");
  details.append(element("summary", "", "All probabilities"));
  const list = element("ul", "probabilities");
  for (const [expert, probability] of ranked) {
    const row = element("li");
    row.dataset.hue = hues.get(expert) ?? "none";
    row.append(element("span", "expert", expert), bar(probability), element("span", "number", percent(probability)));
    list.append(row);
  }
  details.append(list);
  const layer = /^layer:(\d+)$/.exec(decision);
  const told = [layer ? `The router of layer ${layer[1]} decided.` : DECISIONS[decision]];
  if (threshold !== null && score !== null) {
    told.push(`Distance from all domains: ${score.toPrecision(3)}. Above ${threshold.toPrecision(3)} the base answers.`);
  }
  details.append(element("p", "note", told.filter(Boolean).join(" ")));
  return details;
}

// An SVG, as the page's policy forbids style attributes, and as printers leave backgrounds out.
export function bar(share) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 1");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true"); // The number beside it says the same.
  for (const [kind, width] of [["track", 100], ["share", share * 100]]) {
    const rect = document.createElementNS(SVG, "rect");
    rect.setAttribute("class", kind);
    rect.setAttribute("width", width);
    rect.setAttribute("height", 1);
    svg.append(rect);
  }
  return svg;
}
