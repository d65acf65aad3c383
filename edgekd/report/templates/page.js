// Browsing the pictures one at a time. Without scripts, the first are shown and the rest can be opened.
(() => {
  const box = document.querySelector("[data-browse]");
  if (!box) return;
  const all = [...box.querySelectorAll(".example")];
  const bar = box.querySelector(".browse-bar");
  const place = bar.querySelector("output");
  const kinds = [...bar.querySelectorAll("[data-kind]")];
  const [back, on] = bar.querySelectorAll("[data-step]");
  let kind = "", at = 0, paged = true;
  const chosen = () => all.filter((e) => !kind || e.dataset.why === kind);
  const show = () => {
    const some = chosen();
    at = (at + some.length) % some.length;
    all.forEach((e) => { e.hidden = paged ? e !== some[at] : !some.includes(e); });
    place.textContent = paged ? `${at + 1} of ${some.length}` : `all ${some.length}`;
    back.disabled = on.disabled = !paged || some.length < 2;
    kinds.forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.kind === kind)));
  };
  const step = (by) => { at += by; show(); };
  kinds.forEach((b) => b.addEventListener("click", () => { kind = b.dataset.kind; at = 0; show(); }));
  back.addEventListener("click", () => step(-1));
  on.addEventListener("click", () => step(1));
  const every = bar.querySelector("[data-all]");
  every.addEventListener("click", () => {
    paged = !paged;
    every.setAttribute("aria-pressed", String(!paged));
    show();
  });
  box.addEventListener("keydown", (e) => {
    if (!paged || !["ArrowLeft", "ArrowRight"].includes(e.key)) return;
    step(e.key === "ArrowLeft" ? -1 : 1);
    e.preventDefault();
  });
  const rest = box.querySelector("details");
  if (rest) { rest.replaceWith(...rest.querySelectorAll(".example")); }
  bar.hidden = false;
  addEventListener("beforeprint", () => all.forEach((e, i) => { e.hidden = i >= 4; }));
  addEventListener("afterprint", show);
  show();
})();
