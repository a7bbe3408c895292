"use strict";
/* The frame around every page: where one is, where one can go, keys, light and dark. */
(() => {
  const { el, load, where, address, say } = SAE;
  SAE.state = { list: null };
  const main = document.getElementById("main"), top = document.getElementById("top");
  const LINKS = [["features", "Features"], ["map", "Map"], ["run", "Run"], ["compare", "Compare"], ["text", "Text"]];
  const THEMES = ["auto", "light", "dark"];

  function theme(next) {
    let now = "auto";
    try { now = localStorage.getItem("theme") || "auto"; if (next) { now = THEMES[(THEMES.indexOf(now) + 1) % 3]; localStorage.setItem("theme", now); } } catch { /* no storage on this page */ }
    document.documentElement.dataset.theme = now;
    return now;
  }

  function header(here) {
    const d = here.dictionary;
    const jump = el("form", { class: "jump", role: "search", onsubmit: (e) => { e.preventDefault(); const f = box.value.trim(); if (/^\d+$/.test(f)) location.hash = SAE.featureAddress(d, f); } });
    const box = el("input", { type: "text", placeholder: "Go to feature", "aria-label": "Go to feature number", id: "jump" });
    jump.append(box);
    const pick = SAE.index.length > 1 ? el("select", { "aria-label": "Dictionary", id: "dictionary", onchange: (e) => { location.hash = address(Number(e.target.value), here.page === "feature" ? "features" : here.page); } }, SAE.index.map((a, i) => el("option", { value: i, selected: i === d }, a.name)))
      : el("span", { class: "run-name" }, SAE.index[d].name);
    const mode = el("button", { type: "button", class: "plain", id: "theme", "aria-label": "Light or dark", onclick: () => { mode.textContent = names[theme(true)]; } });
    const names = { auto: "◐ auto", light: "○ light", dark: "● dark" };
    mode.textContent = names[theme()];
    top.replaceChildren(el("div", { class: "bar-inner" }, pick,
      el("nav", { "aria-label": "Pages" }, LINKS.filter(([page]) => SAE.pages[page]).map(([page, text]) => el("a", { href: address(d, page), "aria-current": here.page === page || (page === "features" && here.page === "feature") ? "page" : null }, text))), jump, mode,
      el("button", { type: "button", class: "plain", id: "help", "aria-label": "Keys", onclick: help }, "?")));
  }

  let drawing = 0;
  async function draw() {
    const mine = ++drawing, here = where(), asked = location.hash;
    SAE.tip.hidden = true;
    if (SAE.leave) { SAE.leave(); SAE.leave = null; }
    if (here.dictionary >= SAE.index.length) here.dictionary = 0;
    header(here);
    const page = SAE.pages[here.page], holder = el("div", { class: `page ${/^[a-z]+$/.test(here.page) ? here.page : ""}` });
    main.setAttribute("aria-busy", "true");
    try {
      main.replaceChildren(holder);
      if (!SAE.index[here.dictionary].d_sae && here.page !== "run") { location.replace(address(here.dictionary, "run")); return; }
      if (!page) throw new Error(`there is no page “${here.page.slice(0, 40)}”`);
      document.title = (LINKS.find(([name]) => name === here.page) || ["", "Feature"])[1];
      holder.append(el("p", { class: "quiet" }, "Loading …"));
      await page(holder, here);
    } catch (error) {
      if (mine === drawing) holder.replaceChildren(el("h1", {}, "Not here"), el("p", {}, error.message), el("p", {}, el("a", { href: address(here.dictionary, "features") }, "To the list of features")));
    }
    if (mine !== drawing) return;
    main.removeAttribute("aria-busy");
    SAE.drawn = asked;
    if (draw.before) scrollTo(0, 0);
    draw.before = true;
    say(document.title);
  }

  const KEYS = [["/", "search"], ["← →", "previous and next feature"], ["r", "a random feature"], ["l", "label this feature"], ["↓ ↑", "line by line in the list"], ["1 2 3", "short, medium, full context"], ["?", "these keys"]];
  function help() {
    const box = el("dialog", { id: "keys", "aria-label": "Keys" }, el("h2", {}, "Keys"), el("dl", { class: "keys" }, KEYS.map(([key, what]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, what)])), el("button", { type: "button", onclick: () => box.close() }, "Close"));
    box.addEventListener("close", () => box.remove());
    document.body.append(box);
    box.showModal();
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) return;
    const click = { ArrowLeft: "previous", ArrowRight: "next", r: "random", l: "edit-label", "?": "help" }[event.key];
    const focus = { "/": "search" }[event.key];
    const target = document.getElementById(click || focus || "");
    const width = { 1: 0, 2: 1, 3: 2 }[event.key];
    if (target && click) { event.preventDefault(); target.click(); }
    else if (event.key === "/") { event.preventDefault(); if (target) target.focus(); else location.hash = address(where().dictionary, "features"); }
    else if (width !== undefined) { const radio = document.querySelectorAll("input[name=width]")[width]; if (radio) radio.click(); }
  });
  document.getElementById("skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
  addEventListener("hashchange", draw);
  theme();
  load("index").then((index) => { SAE.index = index; draw(); }, (error) => { main.replaceChildren(el("p", {}, error.message)); });
})();
