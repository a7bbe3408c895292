"use strict";
/* Small charts in SVG; every bar can be read by pointer, keyboard and screen reader. */
SAE.charts = (() => {
  const { el, number, explain } = SAE;
  const WIDTH = 480, HEIGHT = 110, BOTTOM = 18;

  /** Bars over equal bins. `look(i)` gives the lines of the tooltip, `tone(i)` a class. */
  function bars(counts, edges, { title, log = false, tone = () => "", look, marks = [], onrange } = {}) {
    const height = HEIGHT - BOTTOM, most = Math.max(1, ...counts);
    const size = (count) => count === 0 ? 0
      : Math.max(1.5, height * (log ? Math.log1p(count) / Math.log1p(most) : count / most));
    const wide = WIDTH / counts.length;
    const svg = el("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "bars", role: "img", "aria-label": title });
    counts.forEach((count, i) => {
      const tall = size(count);
      svg.append(el("rect", { x: i * wide + 0.5, y: height - tall, width: Math.max(0.5, wide - 1), height: tall, rx: 1, class: "bar " + tone(i) }));
      const over = el("rect", { x: i * wide, y: 0, width: wide, height, class: "over" });
      explain(over, () => look ? look(i) : [[`${number(edges[i])} to ${number(edges[i + 1])}`, number(count)]]);
      svg.append(over);
    });
    for (const [at, text] of marks) {
      const x = WIDTH * (at - edges[0]) / (edges[edges.length - 1] - edges[0]);
      svg.append(el("line", { x1: x, x2: x, y1: 0, y2: height, class: "mark" }), el("text", { x: x + 3, y: 10, class: "label" }, text));
    }
    svg.append(el("line", { x1: 0, x2: WIDTH, y1: height + 0.5, y2: height + 0.5, class: "axis" }));
    const zero = edges[0] < 0 && edges[edges.length - 1] > 0;
    const put = (x, anchor, text) => svg.append(el("text", { x, y: HEIGHT - 4, "text-anchor": anchor, class: "label" }, text));
    put(0, "start", number(edges[0]));
    put(WIDTH, "end", number(edges[edges.length - 1]));
    if (zero) put(-WIDTH * edges[0] / (edges[edges.length - 1] - edges[0]), "middle", "0");
    if (onrange) brush(svg, WIDTH, (a, b) => onrange(a / WIDTH, b / WIDTH));
    return svg;
  }

  /** Lets the reader drag over a chart; `done(from, to)` in the units of its viewBox. */
  function brush(svg, width, done) {
    const band = el("rect", { class: "band", x: 0, y: 0, width: 0, height: "100%" });
    svg.append(band);
    svg.classList.add("brush");
    let start = null;
    const at = (event) => {
      const box = svg.getBoundingClientRect();
      return Math.max(0, Math.min(width, (event.clientX - box.left) / box.width * width));
    };
    svg.addEventListener("pointerdown", (event) => { start = at(event); svg.setPointerCapture(event.pointerId); });
    svg.addEventListener("pointermove", (event) => {
      if (start === null) return;
      const now = at(event);
      band.setAttribute("x", Math.min(start, now));
      band.setAttribute("width", Math.abs(now - start));
    });
    svg.addEventListener("pointerup", (event) => {
      if (start === null) return;
      const now = at(event), from = Math.min(start, now), to = Math.max(start, now);
      start = null;
      band.setAttribute("width", 0);
      done(to - from < width / 100 ? null : from, to);
    });
  }

  /** Lines over a common x axis: series of {name, points: [[x, y], …]}. */
  function lines(series, { title, xname = "tokens", height = 200, log = false } = {}) {
    const W = 640, L = 52, B = 24, T = 8;
    const real = series.map((s) => ({ ...s, points: s.points.filter(([, y]) => y !== null && (!log || y > 0)) })).filter((s) => s.points.length);
    const svg = el("svg", { viewBox: `0 0 ${W} ${height}`, class: "lines", role: "img", "aria-label": title });
    if (!real.length) return svg;
    const xs = real.flatMap((s) => s.points.map((p) => p[0])), ys = real.flatMap((s) => s.points.map((p) => p[1]));
    const scale = log ? Math.log10 : (y) => y;
    let low = Math.min(...ys), high = Math.max(...ys);
    if (!log) low = Math.min(0, low);
    if (low === high) high = low + 1;
    const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
    const px = (x) => L + (W - L - 8) * (x - x0) / (x1 - x0);
    const py = (y) => T + (height - T - B) * (1 - (scale(y) - scale(low)) / (scale(high) - scale(low)));
    for (const y of ticks(low, high, log)) {
      svg.append(el("line", { x1: L, x2: W - 8, y1: py(y), y2: py(y), class: "grid" }),
        el("text", { x: L - 6, y: py(y) + 4, "text-anchor": "end", class: "label" }, number(y)));
    }
    for (const x of ticks(x0, x1, false)) {
      if (x > x0 && px(x) < W - 160) svg.append(el("text", { x: px(x), y: height - 6, "text-anchor": "middle", class: "label" }, short(x)));
    }
    svg.append(el("text", { x: W - 8, y: height - 6, "text-anchor": "end", class: "label" }, `${short(x1)} ${xname}`));
    real.forEach((s, i) => {
      svg.append(el("polyline", { class: `line line-${i}`, points: s.points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" ") }));
    });
    const over = el("rect", { x: L, y: T, width: W - L - 8, height: height - T - B, class: "over" });
    const cursor = el("line", { y1: T, y2: height - B, x1: 0, x2: 0, class: "cursor", hidden: true });
    let spot = 0;
    over.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = x0 + (x1 - x0) * ((event.clientX - box.left) / box.width * W - L) / (W - L - 8);
      spot = nearest(real[0].points, x);
      cursor.removeAttribute("hidden");
      cursor.setAttribute("x1", px(real[0].points[spot][0]));
      cursor.setAttribute("x2", px(real[0].points[spot][0]));
      over.dispatchEvent(new Event("pointerenter"));
    });
    explain(over, () => {
      const x = real[0].points[spot][0];
      return [[xname, number(x)], ...real.map((s) => [s.name, number(s.points[nearest(s.points, x)][1])])];
    });
    svg.append(cursor, over);
    return svg;
  }

  /** Round numbers in a range: 1, 2 and 5 times powers of ten, or those a round step apart. */
  function ticks(low, high, log) {
    const round = (x) => Number(x.toPrecision(12));
    if (log) {
      const found = [];
      for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++) for (const m of [1, 2, 5]) found.push(round(m * 10 ** p));
      const inside = found.filter((y) => y >= low && y <= high);
      if (inside.length > 6) return inside.filter((y) => Math.abs(Math.log10(y) % 1) < 1e-9);
      if (inside.length > 1) return inside;
    }
    const power = 10 ** Math.floor(Math.log10((high - low) / 4)), rest = (high - low) / 4 / power;
    const step = power * (rest > 5 ? 10 : rest > 2 ? 5 : rest > 1 ? 2 : 1);
    const found = [];
    for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(round(k * step));
    return found;
  }
  const short = (x) => x >= 1e9 ? `${Number((x / 1e9).toPrecision(3))}G` : x >= 1e6 ? `${Number((x / 1e6).toPrecision(3))}M` : x >= 1e4 ? `${Number((x / 1e3).toPrecision(3))}k` : number(x);

  function nearest(points, x) {
    let low = 0, high = points.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; if (points[mid][0] < x) low = mid; else high = mid; }
    return Math.abs(points[low][0] - x) < Math.abs(points[high][0] - x) ? low : high;
  }

  /** Counts of values in bins of equal width; NaN and what is outside are left out. */
  function count(values, pick, low, high, bins) {
    const counts = new Array(bins).fill(0);
    for (let i = 0; i < values.length; i++) {
      const value = pick(values[i]);
      if (value >= low && value <= high) counts[Math.min(bins - 1, Math.floor((value - low) / (high - low) * bins))]++;
    }
    const edges = Array.from({ length: bins + 1 }, (_, i) => low + (high - low) * i / bins);
    return { counts, edges };
  }

  return { bars, lines, count, brush };
})();
