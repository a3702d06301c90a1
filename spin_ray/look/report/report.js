"use strict";
// The only script of the page: the timeline's zoom and the table of answers. Text is set as text, never as markup.
(() => {
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  for (const lane of document.querySelectorAll(".lane")) {
    const svg = lane.querySelector("svg"), axis = lane.querySelector(".seconds"), buttons = lane.closest("section, details");
    const end = Number(svg.dataset.end), rows = Number(svg.dataset.rows);
    let begin = 0, width = end;
    const show = () => {
      width = Math.min(end, Math.max(end / 5000, width));
      begin = Math.min(end - width, Math.max(0, begin));
      svg.setAttribute("viewBox", `${begin} 0 ${width} ${rows}`);
      axis.replaceChildren(...[0, 1, 2, 3, 4].map((k) => make("span", "", `${(begin + width * k / 4).toFixed(width < 20 ? 1 : 0)} s`)));
    };
    const zoom = (factor, at) => {
      const next = Math.min(end, Math.max(end / 5000, width / factor));
      begin += (width - next) * at;
      width = next;
      show();
    };
    const place = (event) => (event.clientX - svg.getBoundingClientRect().left) / svg.getBoundingClientRect().width;
    svg.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY < 0 ? 1.25 : 0.8, place(event)); }, { passive: false });
    const held = new Map();
    svg.addEventListener("pointerdown", (event) => { held.set(event.pointerId, event.clientX); svg.setPointerCapture(event.pointerId); });
    svg.addEventListener("pointermove", (event) => {
      if (!held.has(event.pointerId)) return;
      const others = [...held].filter(([id]) => id !== event.pointerId).map(([, x]) => x);
      const before = held.get(event.pointerId);
      if (others.length) zoom(Math.abs(event.clientX - others[0]) / Math.max(1, Math.abs(before - others[0])), place(event));
      else { begin -= (event.clientX - before) / svg.getBoundingClientRect().width * width; show(); }
      held.set(event.pointerId, event.clientX);
    });
    for (const name of ["pointerup", "pointercancel"]) svg.addEventListener(name, (event) => held.delete(event.pointerId));
    for (const button of buttons.querySelectorAll("button[data-zoom]")) {
      const factor = Number(button.dataset.zoom);
      button.addEventListener("click", () => { if (factor) zoom(factor, 0.5); else { begin = 0; width = end; show(); } });
    }
    show();
  }

  const source = document.getElementById("samples-data");
  if (!source) return;
  const { versions, rows } = JSON.parse(source.textContent);
  const STEP = 20, list = document.getElementById("rows"), count = document.getElementById("count"), more = document.getElementById("more");
  const search = document.getElementById("search"), filter = document.getElementById("filter");
  const shown = versions.map(() => true);
  const text = (pieces) => pieces.map((piece) => piece[0]).join("");
  const all = rows.map((row) => {
    const real = text(row.real), answers = row.answers.map(text), last = answers[answers.length - 1];
    return { row, words: [row.prompt, real, ...answers].join("\n").toLowerCase(), changed: answers.some((one) => one !== answers[0]), right: last === real };
  });
  const fits = { all: () => true, changed: (one) => one.changed, right: (one) => one.right, wrong: (one) => !one.right };
  const colour = (ratio) => {
    const size = Math.abs(ratio), level = size < 0.1 ? 0 : size < 0.5 ? 1 : size < 2 ? 2 : 3;
    return level ? (ratio > 0 ? "p" : "m") + level : "";
  };
  const answer = (pieces) => {
    const line = make("dd");
    for (const [words, ratio] of pieces) {
      if (ratio === undefined) { line.append(words); continue; }
      const piece = make("span", colour(ratio), words);
      piece.title = `${ratio > 0 ? "+" : ""}${ratio} nats`;
      line.append(piece);
    }
    return line;
  };
  const drawn = ({ row }) => {
    const box = make("div", "sample"), table = make("dl");
    box.append(make("div", "prompt", row.prompt), table);
    table.append(make("dt", "", "real"), answer(row.real));
    row.answers.forEach((pieces, k) => { if (shown[k]) table.append(make("dt", "", versions[k]), answer(pieces)); });
    return box;
  };
  let limit = STEP;
  const show = () => {
    const words = search.value.toLowerCase();
    const found = all.filter((one) => fits[filter.value](one) && one.words.includes(words));
    list.replaceChildren(...found.slice(0, limit).map(drawn));
    count.textContent = `${found.length} of ${all.length}`;
    more.hidden = found.length <= limit;
  };
  const anew = () => { limit = STEP; show(); };
  search.addEventListener("input", anew);
  filter.addEventListener("change", anew);
  more.addEventListener("click", () => { limit += STEP; show(); });
  for (const box of document.querySelectorAll("[data-version]"))
    box.addEventListener("change", () => { shown[Number(box.dataset.version)] = box.checked; show(); });
  show();
})();
