"use strict";
/* What all pages share: elements made of text only, parts loaded as scripts, addresses, numbers.

   Text from data never becomes markup: `el` makes text nodes and sets attributes from a short list,
   and nothing here parses HTML. */
const SAE = (() => {
  const waiting = new Map(), parts = new Map();
  const MOST = { rows: 300, features: 24, text: 60 }; // parts of each kind that are kept
  const pages = Object.create(null); // so that an address cannot name what objects inherit
  const token = document.querySelector("meta[name=sae-token]").content;

  /* ------------------------------------------------------------------------------ elements */

  const ATTRIBUTES = new Set(["class", "id", "role", "tabindex", "title", "type", "for", "name",
    "min", "max", "step", "value", "placeholder", "scope", "colspan", "d", "x", "y", "x1", "x2",
    "y1", "y2", "cx", "cy", "r", "rx", "width", "height", "viewBox", "points", "fill", "stroke",
    "stroke-width", "transform", "preserveAspectRatio", "text-anchor", "maxlength", "rows",
    "autocomplete", "spellcheck", "download", "lang", "dir", "multiple", "open", "hidden"]);

  /** An element; children are text or elements, `on…` functions listen, `href` only inside. */
  function el(name, attributes = {}, ...children) {
    const svg = SVG.has(name);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name)
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (key === "href") made.setAttribute("href", inside(value));
      else if (key === "data") Object.assign(made.dataset, value);
      else if (key === "css") for (const [k, v] of Object.entries(value)) made.style.setProperty(k, v);
      else if (key === "value" && !svg) made.value = value;
      else if (key === "checked" || key === "disabled" || key === "selected") made[key] = true;
      else if (ATTRIBUTES.has(key) || key.startsWith("aria-")) made.setAttribute(key, value === true ? "" : String(value));
      else throw new Error("no attribute " + key);
    }
    made.append(...children.flat(3).filter((c) => c !== null && c !== undefined && c !== false)
      .map((c) => (c instanceof Node ? c : String(c))));
    return made;
  }
  const SVG = new Set(["svg", "rect", "line", "path", "circle", "g", "polyline", "text"]);

  /** Addresses lead to another place of these pages, never anywhere else. */
  const inside = (address) => (String(address).startsWith("#") ? String(address) : "#");

  /* --------------------------------------------------------------------------------- parts */

  /** Called by the script of a part. */
  function put(key, value) {
    parts.set(key, value);
    const kind = /(rows|features|text)-\d/.exec(key);
    if (!kind) return;
    const own = [...parts.keys()].filter((other) => other.includes(`/${kind[1]}-`));
    if (own.length > MOST[kind[1]]) parts.delete(own[0]);
  }

  /** A part of a dictionary, loaded once; `fresh` asks again. */
  function load(key, fresh = false) {
    if (!fresh && parts.has(key)) return Promise.resolve(parts.get(key));
    if (waiting.has(key)) return waiting.get(key);
    const promise = new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `data/${key}.js` + (fresh ? `?${Date.now()}` : "");
      script.onload = () => {
        script.remove();
        if (parts.has(key)) resolve(parts.get(key));
        else reject(new Error(`data/${key}.js holds something else`));
      };
      script.onerror = () => {
        script.remove();
        reject(new Error(`data/${key}.js cannot be loaded`));
      };
      document.head.append(script);
    }).finally(() => waiting.delete(key));
    waiting.set(key, promise);
    return promise;
  }

  /** Forget a part, so that it is asked for again. */
  const forget = (key) => parts.delete(key);

  /** Ask the server to compute or to write something. */
  async function ask(what, body, signal) {
    if (!served()) throw new Error("this needs the server");
    const response = await fetch(`api/${what}`, {
      method: "POST", signal, credentials: "omit",
      headers: { "Content-Type": "application/json", "X-SAE-Token": token },
      body: JSON.stringify(body),
    });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error || `the server answered ${response.status}`);
    return answer;
  }
  const served = () => token !== "";

  /** fp32 numbers from base64. */
  function numbers(text, kind = Float32Array) {
    if (Uint8Array.fromBase64) return new kind(Uint8Array.fromBase64(text).buffer);
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return new kind(bytes.buffer);
  }

  /* --------------------------------------------------------------------------------- texts */

  const percent = (share) => share === null || Number.isNaN(share) ? "–"
    : share === 0 ? "0 %" : share < 1e-5 ? (100 * share).toExponential(1) + " %"
      : (100 * share).toPrecision(share < 0.1 ? 2 : 3).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "") + " %";
  const number = (x) => x === null || x === undefined || Number.isNaN(x) ? "–"
    : Number.isInteger(x) && Math.abs(x) < 1e15 ? x.toLocaleString("en")
      : Math.abs(x) >= 1e4 || Math.abs(x) < 1e-3 ? x.toExponential(1) : String(Number(x.toPrecision(3)));
  const signed = (x) => (x > 0 ? "+" : x < 0 ? "−" : "") + number(Math.abs(x));

  /** A token as one sees it: spaces, line ends and what has no shape get a sign. */
  function visible(text) {
    let shown = text.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/\r/g, "␍")
      // eslint-disable-next-line no-control-regex
      .replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g,
        (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
    if (/^ +$/.test(shown)) shown = "␣".repeat(Math.min(shown.length, 20));
    return shown;
  }

  /** A token in a list, its leading space left out. */
  function chip(piece, extra = "") {
    const shown = visible(piece);
    const short = shown.length > 60 ? shown.slice(0, 60) + "…" : shown;
    return el("span", { class: "chip " + extra, dir: "ltr" }, short.replace(/^ (?=.)/, ""));
  }

  /** Say something to those who do not see it. */
  function say(text) { document.getElementById("said").textContent = text; }

  /* ------------------------------------------------------------------------------ addresses */

  /** #/0/feature/12?width=5 → {dictionary: 0, page: "feature", rest: ["12"], query}. */
  function where() {
    const [path, query = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
    const [first = "", page = "", ...rest] = path.split("/");
    const dictionary = /^\d+$/.test(first) ? Number(first) : 0;
    return { dictionary, page: page || "features", rest, query: new URLSearchParams(query) };
  }

  /** The address of a page of a dictionary; empty values are left out. */
  function address(dictionary, page, query = {}) {
    const given = new URLSearchParams();
    for (const [key, value] of Object.entries(query)) {
      if (value !== null && value !== undefined && value !== "") given.set(key, value);
    }
    const text = given.toString();
    return `#/${dictionary}/${page}` + (text ? "?" + text : "");
  }

  /** Change the address without a new entry in the history, and without drawing anew. */
  function keep(to) { if (to !== location.hash) history.replaceState(null, "", to); }

  const featureAddress = (dictionary, feature) => address(dictionary, `feature/${feature}`);

  /** A link to a feature. */
  const link = (dictionary, feature, ...content) =>
    el("a", { href: featureAddress(dictionary, feature), class: "feature-link" },
      content.length ? content : String(feature));

  /* --------------------------------------------------------------------------------- colour */

  /** Set the shade of a token by the share of the maximum; the page's style turns it to colour. */
  function shade(element, share) {
    if (share > 0) {
      const level = Math.min(1, Math.sqrt(share));
      element.style.setProperty("--share", level.toFixed(3));
      element.classList.add("on");
      if (level > 0.75) element.classList.add("strong");
    }
    return element;
  }

  /* -------------------------------------------------------------------------------- tooltip */

  const tip = document.getElementById("tip");
  /** Show lines of [name, value] beside an element while the pointer or the focus is there. */
  function explain(element, lines) {
    const show = () => {
      tip.replaceChildren(el("dl", {}, lines().map(([name, value]) =>
        [el("dt", {}, name), el("dd", {}, value)])));
      tip.hidden = false;
      const box = element.getBoundingClientRect(), own = tip.getBoundingClientRect();
      const left = Math.max(8, Math.min(box.left, innerWidth - own.width - 8));
      const below = box.bottom + own.height + 10 < innerHeight;
      tip.style.left = `${left}px`;
      tip.style.top = `${below ? box.bottom + 6 : Math.max(4, box.top - own.height - 6)}px`;
    };
    const hide = () => { tip.hidden = true; };
    element.addEventListener("pointerenter", show);
    element.addEventListener("pointerleave", hide);
    element.addEventListener("focus", show);
    element.addEventListener("blur", hide);
    return element;
  }

  /** Give a file to the reader. */
  function save(name, type, text) {
    const url = URL.createObjectURL(new Blob([text], { type }));
    const made = document.createElement("a");
    made.href = url;
    made.download = name;
    document.body.append(made);
    made.click();
    made.remove();
    setTimeout(() => URL.revokeObjectURL(url), 5000);
  }

  load("index").catch(() => {}); // on its way while the other scripts load; start.js tells of a failure

  return { el, put, load, forget, ask, served, numbers, percent, number, signed, visible, chip, say,
    where, address, keep, featureAddress, link, shade, explain, save, pages, tip, index: null };
})();
