"use strict";
// Curves as inline SVG, drawn again from /api/curves while the page is open.
(() => {
  const host = document.getElementById("curves");
  if (!host) return;
  const runs = JSON.parse(host.dataset.runs);
  const colours = ["#2457a6", "#c2410c", "#15803d", "#7e22ce", "#be123c", "#0e7490", "#a16207", "#4b5563"];
  const SVG = "http://www.w3.org/2000/svg";
  const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [460, 230, 58, 26, 10, 22];
  const panels = new Map();

  function element(name, attributes, parent, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  function short(value) {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  }

  function ticks(low, high) {
    const rough = (high - low) / 4;
    const power = Math.pow(10, Math.floor(Math.log10(rough)));
    const unit = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough);
    const found = [];
    for (let value = Math.ceil(low / unit) * unit; value <= high + unit * 1e-9; value += unit) found.push(value);
    return found;
  }

  function extent(curves, key) {
    let [low, high] = [Infinity, -Infinity];
    for (const curve of curves) for (const value of curve[key]) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
    if (low === high) { const margin = Math.abs(low) * 0.05 || 1; return [low - margin, high + margin]; }
    return [low, high];
  }

  function draw(place, panel) {
    const svg = place.querySelector("svg");
    svg.replaceChildren();
    const [x0, x1] = extent(panel.curves, "x");
    const [y0, y1] = extent(panel.curves, "y");
    const across = (x) => LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT);
    const up = (y) => HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
    for (const value of ticks(y0, y1)) {
      element("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: up(value), y2: up(value), class: "grid" }, svg);
      element("text", { x: LEFT - 5, y: up(value) + 4, "text-anchor": "end" }, svg, short(value));
    }
    for (const value of ticks(x0, x1)) element("text", { x: across(value), y: HEIGHT - 6, "text-anchor": "middle" }, svg, short(value));
    const names = [...new Set(panel.curves.map((curve) => curve.name))];
    for (const curve of panel.curves) {
      const colour = colours[curve.run % colours.length];
      const opacity = 1 - 0.75 * names.indexOf(curve.name) / Math.max(1, names.length - 1);
      const points = curve.x.map((x, i) => `${across(x).toFixed(1)},${up(curve.y[i]).toFixed(1)}`).join(" ");
      const line = element("polyline", { points, stroke: colour, "stroke-opacity": opacity }, svg);
      line.dataset.last = curve.x[curve.x.length - 1];
      if (curve.x.length === 1) element("circle", { cx: across(curve.x[0]), cy: up(curve.y[0]), r: 2.5, fill: colour }, svg);
    }
    svg.onmousemove = (event) => {
      const box = svg.getBoundingClientRect();
      const wanted = x0 + ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * (x1 - x0);
      const said = panel.curves.map((curve) => {
        let nearest = 0;
        curve.x.forEach((x, i) => { if (Math.abs(x - wanted) < Math.abs(curve.x[nearest] - wanted)) nearest = i; });
        const run = runs.length > 1 ? `${runs[curve.run]} ` : "";
        return `${run}${curve.name} ${short(curve.y[nearest])} at ${short(curve.x[nearest])}`;
      });
      place.querySelector(".at").textContent = said.join(" · ");
    };
  }

  function place(panel, parent) {
    const made = document.createElement("div");
    made.className = "panel";
    made.dataset.title = panel.title;
    const title = document.createElement("h3");
    title.textContent = panel.title;
    const at = document.createElement("div");
    at.className = "at";
    made.append(title);
    element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": panel.title }, made);
    made.append(at);
    parent.append(made);
    return made;
  }

  const legend = document.createElement("div");
  legend.className = "all";
  runs.forEach((run, i) => {
    const name = document.createElement("span");
    name.textContent = `● ${run}  `;
    name.style.color = colours[i % colours.length];
    legend.append(name);
  });
  if (runs.length > 1) host.append(legend);
  const more = document.createElement("details");
  const summary = document.createElement("summary");
  summary.textContent = "All other values";
  const others = document.createElement("div");
  more.append(summary, others);

  async function refresh() {
    const query = new URLSearchParams(runs.map((run) => ["run", run]));
    try {
      const answer = await fetch(`/api/curves?${query}`);
      if (answer.status === 401) { location.reload(); return; }
      if (answer.ok) {
        for (const panel of (await answer.json()).panels) {
          if (!panels.has(panel.title)) panels.set(panel.title, place(panel, panel.main ? host : others));
          draw(panels.get(panel.title), panel);
        }
        if (others.children.length) host.append(more);
        host.dataset.ready = "yes";
      }
    } catch { /* the server is away for a moment; it is asked again */ }
    setTimeout(refresh, document.hidden ? 15000 : 3000);
  }
  refresh();
})();
