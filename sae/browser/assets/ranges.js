"use strict";
/* Ranges of numbers to filter the list by: sliders under a histogram each, and a plot of density
   against the strongest activation, all of which can be dragged over. */
SAE.ranges = (() => {
  const { el, charts, number, percent } = SAE;
  const BINS = 48, STEPS = 240;

  /** How a column is shown: on a log scale where it spans decades. */
  function scale(t, name) {
    const values = t[name];
    let low = Infinity, high = -Infinity;
    for (let i = 0; i < values.length; i++) if (values[i] > 0) { if (values[i] < low) low = values[i]; if (values[i] > high) high = values[i]; }
    if (!(high > low)) return null;
    const log = name === "density" || high / low > 100;
    const to = log ? Math.log10 : (x) => x, back = log ? (x) => 10 ** x : (x) => x;
    return { low: to(low), high: to(high), to, back, least: low, most: high };
  }

  function one(t, s, name, text, update, show) {
    const sc = scale(t, name);
    if (!sc) return null;
    const { counts, edges } = charts.count(t[name], sc.to, sc.low, sc.high, BINS);
    const said = el("span", { class: "quiet" }), holder = el("div", { class: "holder" });
    const place = (x) => Math.round(STEPS * (sc.to(x) - sc.low) / (sc.high - sc.low));
    const value = (step) => sc.back(sc.low + (sc.high - sc.low) * step / STEPS);
    const slider = (which, start) => el("input", { type: "range", min: 0, max: STEPS, value: start, "aria-label": `${text}, ${which}` });
    const low = slider("least", s[name] ? place(s[name][0]) : 0), high = slider("most", s[name] ? place(s[name][1]) : STEPS);
    function set(from, to) {
      const a = Math.min(from, to), b = Math.max(from, to);
      s[name] = a <= 0 && b >= STEPS ? null : [a <= 0 ? sc.least : value(a), b >= STEPS ? sc.most : value(b)];
      low.value = a; high.value = b;
      tell();
      update();
    }
    function tell() {
      const a = Number(low.value) / STEPS, b = Number(high.value) / STEPS;
      said.textContent = `${show(s[name] ? s[name][0] : sc.least)} to ${show(s[name] ? s[name][1] : sc.most)}`;
      said.classList.toggle("chosen", Boolean(s[name]));
      const chart = charts.bars(counts, edges, { title: `${text}: number of features`, log: true,
        tone: (i) => (i + 0.5) / BINS < a || (i + 0.5) / BINS > b ? "out" : "",
        look: (i) => [[`${show(sc.back(edges[i]))} to ${show(sc.back(edges[i + 1]))}`, `${number(counts[i])} features`]],
        onrange: (x, y) => (x === null ? set(0, STEPS) : set(Math.round(x * STEPS), Math.round(y * STEPS))) });
      chart.querySelectorAll("text").forEach((node) => node.remove());
      holder.replaceChildren(chart);
    }
    low.addEventListener("change", () => set(Number(low.value), Number(high.value)));
    high.addEventListener("change", () => set(Number(low.value), Number(high.value)));
    tell();
    return { node: el("fieldset", { class: "range" }, el("legend", {}, text, " ", said), holder, el("div", { class: "sliders" }, low, high)), set, sc, place };
  }

  /** Density × max as a picture of counts; dragging selects in both. */
  function scatter(t, found) {
    const { density, max } = found, W = t.n < 5000 ? 90 : 200, H = t.n < 5000 ? 36 : 84;
    const canvas = el("canvas", { width: W, height: H, role: "img", "aria-label": "Density against the strongest activation; drag to select" });
    const counts = new Uint32Array(W * H);
    for (let i = 0; i < t.n; i++) {
      const x = (density.sc.to(t.density[i]) - density.sc.low) / (density.sc.high - density.sc.low), y = (max.sc.to(t.max[i]) - max.sc.low) / (max.sc.high - max.sc.low);
      if (x >= 0 && x <= 1 && y >= 0 && y <= 1) counts[Math.round((1 - y) * (H - 1)) * W + Math.round(x * (W - 1))]++;
    }
    const most = Math.log1p(counts.reduce((a, b) => Math.max(a, b), 1));
    const draw = canvas.getContext("2d"), image = draw.createImageData(W, H);
    const [r, g, b] = [217, 119, 32];
    counts.forEach((c, i) => { if (c) image.data.set([r, g, b, 100 + 155 * Math.log1p(c) / most], 4 * i); });
    draw.putImageData(image, 0, 0);
    const band = el("div", { class: "rect-band", hidden: true }), holder = el("div", { class: "scatter" }, canvas, band);
    let start = null;
    const at = (e) => { const q = holder.getBoundingClientRect(); return [Math.max(0, Math.min(1, (e.clientX - q.left) / q.width)), Math.max(0, Math.min(1, (e.clientY - q.top) / q.height))]; };
    const box = (a, b2) => [Math.min(a[0], b2[0]), Math.min(a[1], b2[1]), Math.max(a[0], b2[0]), Math.max(a[1], b2[1])];
    holder.addEventListener("pointerdown", (e) => { start = at(e); holder.setPointerCapture(e.pointerId); });
    holder.addEventListener("pointermove", (e) => {
      if (!start) return;
      const [x0, y0, x1, y1] = box(start, at(e));
      band.hidden = false;
      band.style.left = `${100 * x0}%`; band.style.top = `${100 * y0}%`;
      band.style.width = `${100 * (x1 - x0)}%`; band.style.height = `${100 * (y1 - y0)}%`;
    });
    holder.addEventListener("pointerup", (e) => {
      if (!start) return;
      const [x0, y0, x1, y1] = box(start, at(e));
      start = null;
      band.hidden = true;
      if (x1 - x0 < 0.02) { density.set(0, STEPS); max.set(0, STEPS); return; }
      density.set(Math.round(x0 * STEPS), Math.round(x1 * STEPS));
      max.set(Math.round((1 - y1) * STEPS), Math.round((1 - y0) * STEPS));
    });
    return el("fieldset", { class: "range" }, el("legend", {}, "Density × max ", el("span", { class: "quiet" }, "drag to select")), holder);
  }

  function draw(plots, t, s, update) {
    const density = one(t, s, "density", "Density", update, percent), max = one(t, s, "max", "Max", update, number);
    const neurons = one(t, s, "participation", "Neurons", update, number);
    const made = [density && density.node, max && max.node, neurons && neurons.node, density && max && scatter(t, { density, max })].filter(Boolean);
    plots.replaceChildren(...made);
  }
  return { draw };
})();
