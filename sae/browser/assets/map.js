"use strict";
/* All features on a plane, near where their directions are alike; a click opens one. */
(() => {
  const { el, load, numbers, number, percent, explain } = SAE;
  const W = 1200, H = 600, EDGE = 16, REACH = 14, MANY = 20000, SHADES = 64;
  // From dark to light evenly, and readable without telling red from green (after viridis).
  const RAMP = [[112, 62, 150], [59, 82, 139], [33, 145, 140], [94, 201, 98], [223, 205, 40]];

  async function page(main, { dictionary: d }) {
    const [t, raw] = await Promise.all([SAE.list.table(d), load(`${d}/map`)]);
    const n = t.n, places = place(numbers(raw.xy), n);
    if (n > MANY) SAE.forget(`${d}/map`);
    const by = el("select", { id: "colour", "aria-label": "Colour by" }, [["density", "density"], ["max", "strongest activation"], ["label", "label"]].map(([value, text]) => el("option", { value }, text)));
    const dead = el("input", { type: "checkbox" });
    const canvas = el("canvas", { width: W, height: H, id: "map", role: "img", tabindex: 0, "aria-label": `Map of ${number(n)} features; the list holds the same features as text` });
    const legend = el("p", { class: "quiet" }), said = el("p", { class: "quiet", role: "status", id: "under" }, "Point at a feature; click opens it.");
    main.replaceChildren(el("div", { class: "page-head between" }, el("div", {}, el("h1", {}, "Map"), el("p", { class: "quiet" }, `${number(n)} features; ${raw.how}`)), el("span", { class: "tools" }, el("label", { class: "check" }, "Colour by", by), el("label", { class: "check" }, dead, "dead ones too"))), el("div", { class: "between map-said" }, said, legend), el("div", { class: "card wide map-holder" }, canvas));
    const pen = canvas.getContext("2d");
    const shown = (i) => dead.checked || t.density[i] > 0;
    function draw() {
      const { palette, pick } = tone(t, by.value, legend);
      pen.clearRect(0, 0, W, H);
      if (n > MANY) { fill(pen, places, palette, pick, shown); return; }
      const size = Math.max(1.5, Math.min(4, 260 / Math.sqrt(n))), styles = palette.map((c) => `rgb(${c})`);
      pen.globalAlpha = 0.85;
      for (let i = 0; i < n; i++) {
        if (!shown(i)) continue;
        pen.fillStyle = styles[pick(i)];
        pen.beginPath();
        pen.arc(places[2 * i], places[2 * i + 1], size, 0, 7);
        pen.fill();
      }
    }
    function nearest(event) {
      const box = canvas.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * W, y = (event.clientY - box.top) / box.height * H;
      let best = -1, least = REACH * REACH;
      for (let i = 0; i < n; i++) {
        const dx = places[2 * i] - x, dy = places[2 * i + 1] - y, far = dx * dx + dy * dy;
        if (far < least && shown(i)) { least = far; best = i; }
      }
      return best;
    }
    canvas.addEventListener("pointermove", (event) => {
      const i = nearest(event);
      canvas.style.cursor = i < 0 ? "default" : "pointer";
      if (i < 0) return;
      const f = SAE.list.idOf(t, i), label = t.labels.get(f);
      said.textContent = `Feature ${f}${label ? ` “${label.text}”` : ""}: density ${percent(t.density[i])}, max ${number(t.max[i])}`;
    });
    canvas.addEventListener("click", (event) => { const i = nearest(event); if (i >= 0) location.hash = SAE.featureAddress(d, SAE.list.idOf(t, i)); });
    by.addEventListener("change", draw);
    dead.addEventListener("change", draw);
    draw();
  }

  /** Pixels for coordinates; where a few lie far from all others, distances from the middle are
      drawn on a scale that is nearly logarithmic (asinh), so that nothing is out of sight. */
  function place(xy, n) {
    const found = new Float32Array(2 * n);
    for (const axis of [0, 1]) {
      const values = new Float32Array(n);
      for (let i = 0; i < n; i++) values[i] = xy[2 * i + axis];
      values.sort();
      const at = (share) => values[Math.round(share * (n - 1))];
      const middle = at(0.5), far = at(1) - at(0) > 2 * (at(0.99) - at(0.01)), unit = (at(0.75) - at(0.25)) / 2 || 1;
      const to = far ? (x) => Math.asinh((x - middle) / unit) : (x) => x;
      const low = to(at(0)), range = to(at(1)) - low || 1, room = (axis ? H : W) - 2 * EDGE;
      for (let i = 0; i < n; i++) {
        const share = (to(xy[2 * i + axis]) - low) / range;
        found[2 * i + axis] = EDGE + room * (axis ? 1 - share : share);
      }
    }
    return found;
  }

  /** Very many features: the last of each pixel, two pixels wide and high. */
  function fill(pen, places, palette, pick, shown) {
    const image = pen.createImageData(W, H), pixels = new Uint32Array(image.data.buffer);
    const colours = palette.map(([r, g, b]) => (220 << 24 | b << 16 | g << 8 | r) >>> 0);
    for (let i = 0; i < places.length / 2; i++) {
      if (!shown(i)) continue;
      const at = Math.floor(places[2 * i + 1]) * W + Math.floor(places[2 * i]), colour = colours[pick(i)];
      pixels[at] = pixels[at + 1] = pixels[at + W] = pixels[at + W + 1] = colour;
    }
    pen.putImageData(image, 0, 0);
  }

  /** The colours there are, and which of them each feature has; says it in the legend. */
  function tone(t, name, legend) {
    const GREY = [154, 160, 166];
    if (name === "label") {
      legend.textContent = `${number(t.labels.size)} labelled, in orange`;
      return { palette: [GREY, [224, 123, 26]], pick: (i) => Number(t.labels.has(SAE.list.idOf(t, i))) };
    }
    let low = Infinity, high = -Infinity;
    for (const x of t[name]) if (x > 0) { if (x < low) low = x; if (x > high) high = x; }
    const show = name === "density" ? percent : number, from = Math.log(low), range = Math.log(high) - from || 1;
    legend.replaceChildren("from ", show(low), " ", el("span", { class: "ramp", "aria-hidden": "true" }, RAMP.map((c) => el("i", { css: { background: `rgb(${c})` } }))), " to ", show(high), ", log scale");
    const palette = [GREY, ...Array.from({ length: SHADES }, (_, k) => ramp(k / (SHADES - 1)))];
    return { palette, pick: (i) => (t[name][i] > 0 ? 1 + Math.round((SHADES - 1) * (Math.log(t[name][i]) - from) / range) : 0) };
  }
  function ramp(share) {
    const at = Math.max(0, Math.min(0.9999, share)) * (RAMP.length - 1), i = Math.floor(at), rest = at - i;
    return RAMP[i].map((c, k) => Math.round(c + (RAMP[i + 1][k] - c) * rest));
  }
  SAE.pages.map = page;
})();
