// The picture of experts: a row a layer, a cell an expert, coloured by what the last token did with it.

import { readEvents } from "/static/sse.js";

const NAMES = { h: "--hit", f: "--fetched", a: "--ahead", s: "--slot", ".": "--disk" };

export function watchExperts(canvas, line, headers, signal) {
  let colours = readColours();
  let last = null;
  const draw = () => { if (last) paint(canvas, last, colours); };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => { colours = readColours(); draw(); }, { signal });
  window.addEventListener("resize", draw, { signal });
  return follow();

  async function follow() {
    const answer = await fetch("/offmoe/experts", { headers, signal });
    if (!answer.ok) {
      line.textContent = answer.status === 401 ? "needs the API key" : "not there";
      return;
    }
    for await (const { data } of readEvents(answer.body)) {
      if (!data) continue;
      last = JSON.parse(data);
      const used = last.hits + last.fetched;
      const share = used ? `${Math.round((100 * last.hits) / used)}% hits` : "no token yet";
      line.textContent = `${last.layers.length} layers of ${last.layers[0].length} experts, ${last.in_slots} in slots. `
        + `This token: ${used} used, ${share}, ${last.fetched} fetched, ${last.ahead} fetched ahead.`;
      draw();
    }
  }
}

function readColours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(Object.entries(NAMES).map(([key, name]) => [key, style.getPropertyValue(name).trim()]));
}

function paint(canvas, view, colours) {
  const rows = view.layers.length;
  const columns = view.layers[0].length;
  const width = Math.max(columns, canvas.clientWidth * devicePixelRatio);
  const cell = Math.max(1, Math.floor(width / columns));
  const height = Math.max(2, Math.min(cell, Math.round((14 * devicePixelRatio))));
  canvas.width = cell * columns;
  canvas.height = height * rows;
  canvas.dataset.layers = rows;
  const context = canvas.getContext("2d");
  const gap = cell > 3 ? 1 : 0;
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      context.fillStyle = colours[view.layers[row][column]];
      context.fillRect(column * cell, row * height, cell - gap, height - (height > 3 ? 1 : 0));
    }
  }
}
