"use strict";
(function () {
  const every = 2000;
  const pause = document.getElementById("pause");
  const stale = document.getElementById("stale");
  let paused = false;
  let last = new Date();
  let timer = 0;

  function busy() {
    const s = document.getSelection();
    return paused || document.hidden || (s && !s.isCollapsed);
  }

  function show(text) {
    const now = new DOMParser().parseFromString(text, "text/html");
    for (const old of document.querySelectorAll("[data-live]")) {
      const fresh = now.getElementById(old.id);
      if (!fresh || fresh.innerHTML === old.innerHTML) continue;
      for (const d of old.querySelectorAll("details[open]")) {
        const same = fresh.querySelector('details[data-key="' + CSS.escape(d.dataset.key) + '"]');
        if (same) same.open = true;
      }
      const had = old.contains(document.activeElement);
      old.replaceWith(document.adoptNode(fresh));
      if (had) fresh.focus();
    }
    document.title = now.title;
  }

  async function tick() {
    if (!busy()) {
      try {
        const r = await fetch(location.pathname, { cache: "no-store" });
        if (!r.ok) throw new Error(r.status + " " + r.statusText);
        show(await r.text());
        last = new Date();
        stale.hidden = true;
        document.body.classList.remove("old");
      } catch (e) {
        stale.textContent = "No answer since " + last.toLocaleTimeString() + " (" + e.message + "). What is shown is of then.";
        stale.hidden = false;
        document.body.classList.add("old");
      }
    }
    timer = setTimeout(tick, every);
  }

  pause.hidden = false;
  pause.addEventListener("click", function () {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    pause.textContent = paused ? "Resume" : "Pause";
  });
  document.addEventListener("visibilitychange", function () {
    if (!document.hidden) {
      clearTimeout(timer);
      tick();
    }
  });

  document.addEventListener("submit", async function (e) {
    const form = e.target;
    e.preventDefault();
    const sure = form.dataset.confirm;
    if (sure && !confirm(sure)) return;
    const url = e.submitter && e.submitter.hasAttribute("formaction") ? e.submitter.formAction : form.action;
    const token = document.getElementById("token");
    const said = document.getElementById(form.dataset.output);
    const headers = token && token.value ? { Authorization: "Bearer " + token.value } : {};
    said.textContent = "...";
    try {
      const r = await fetch(url, { method: "POST", headers: headers });
      said.textContent = (await r.text()).trim();
      said.classList.toggle("bad", !r.ok);
    } catch (err) {
      said.textContent = err.message;
      said.classList.add("bad");
    }
  });

  timer = setTimeout(tick, every);
})();
