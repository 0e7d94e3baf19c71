"use strict";
{
  const block = document.getElementById("values");
  const layers = Number(block.dataset.layers), levels = Number(block.dataset.levels);
  const largest = Number(block.dataset.largest), top = Number(block.dataset.top);
  const bytes = Uint8Array.from(atob(block.textContent), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const tokens = [...document.querySelectorAll("section .text span")];
  const number = new Map(tokens.map((span, index) => [span, index]));
  const detail = document.getElementById("detail"), choice = document.getElementById("layer");

  // Stored as the root of its share of the largest value, in 16 bits: small values keep their digits.
  const value = (layer, token) =>
    largest * (view.getUint16(2 * (layer * tokens.length + token), true) / 65535) ** 2;
  const highest = (token) => {
    let best = 0;
    for (let layer = 1; layer < layers; layer++) if (value(layer, token) > value(best, token)) best = layer;
    return best;
  };
  let shown = null;
  const level = (deviation) => (top > 0 ? Math.round((levels - 1) * Math.min(1, Math.sqrt(deviation / top))) : 0);

  function shade() {
    tokens.forEach((span, token) => {
      if (!("last" in span.dataset)) return; // nothing of it was stored
      const layer = choice.value === "" ? highest(token) : Number(choice.value);
      span.className = span.className.replace(/\bd\d\b/, "d" + level(value(layer, token)));
      span.title = `layer ${layer}: ${value(layer, token).toPrecision(3)}`;
    });
  }

  function show(span) {
    shown = span;
    const token = number.get(span), last = Number(span.dataset.last ?? layers - 1);
    const peak = highest(token), bars = document.createElement("div"), name = document.createElement("h2");
    const part = span.closest("article").querySelector("h2").firstChild.textContent.trim();
    name.textContent = `“${span.textContent.trim() || "¶"}” – ${part}, token ${token}`;
    const said = document.createElement("p");
    if ("last" in span.dataset) {
      said.textContent = `Highest at layer ${peak}: ${value(peak, token).toPrecision(3)}. `;
      said.textContent += last < 0 ? "Recomputed nowhere." : `Recomputed in layers 0 to ${last}.`;
    } else {
      said.textContent = span.closest("article").querySelector("small").textContent;
    }
    if (choice.value !== "" && "last" in span.dataset)
      said.textContent += ` At layer ${choice.value}: ${value(Number(choice.value), token).toPrecision(3)}.`;
    bars.className = "bars";
    for (let layer = 0; layer < layers && "last" in span.dataset; layer++) {
      const bar = document.createElement("i");
      bar.style.height = `${100 * Math.sqrt(value(layer, token) / (largest || 1))}%`;
      bar.title = `layer ${layer}: ${value(layer, token).toPrecision(3)}`;
      if (layer <= last) bar.className = "computed";
      bars.append(bar);
    }
    const legend = document.createElement("small");
    legend.textContent = "A bar for each layer (root of the deviation); filled: recomputed.";
    detail.replaceChildren(name, said, ...(bars.childElementCount ? [bars, legend] : []));
  }

  choice.addEventListener("change", () => {
    shade();
    if (shown !== null) show(shown);
  });
  for (const event of ["mouseover", "click"])
    document.querySelector("section").addEventListener(event, ({ target }) => number.has(target) && show(target));
  document.getElementById("control").hidden = detail.hidden = false;
}
