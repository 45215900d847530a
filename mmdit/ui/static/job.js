"use strict";
// Jobs of this page: their state, log and pictures are asked for until they are over.
(() => {
  const byId = (id) => document.getElementById(id);

  function show(place, names) {
    if (place.dataset.shown === JSON.stringify(names)) return;
    place.dataset.shown = JSON.stringify(names);
    place.replaceChildren(...names.map((name) => {
      const source = `/job-files/${place.dataset.job}/${encodeURIComponent(name)}`;
      const film = name.endsWith(".mp4");
      const picture = document.createElement(film ? "video" : "img");
      picture.src = source;
      if (film) Object.assign(picture, { loop: true, muted: true, autoplay: true, controls: true });
      else picture.alt = name;
      const figure = document.createElement("figure");
      const caption = document.createElement("figcaption");
      caption.textContent = name;
      figure.append(picture, caption);
      return figure;
    }));
  }

  async function follow(place) {
    show(place, JSON.parse(place.dataset.pictures));
    let over = false;
    try {
      const answer = await fetch(`/api/job/${place.dataset.job}`);
      if (answer.ok) {
        const facts = await answer.json();
        const said = document.querySelector(`.job-state[data-job="${place.dataset.job}"]`) || byId("state");
        const badge = said.querySelector(".state");
        badge.textContent = facts.state;
        badge.className = `state ${facts.state}`;
        said.querySelector(".reason").textContent = facts.reason;
        place.dataset.pictures = JSON.stringify(facts.pictures);
        show(place, facts.pictures);
        over = facts.over;
        const log = byId("log");
        if (log) {
          const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 5;
          log.textContent = facts.log;
          if (atEnd) log.scrollTop = log.scrollHeight;
          byId("stop").hidden = over;
          byId("again").hidden = !over;
          byId("run").hidden = !facts.run;
          if (facts.run) {
            const link = byId("run").querySelector("a");
            link.textContent = facts.run;
            link.href = `/run/${facts.run.split("/").map(encodeURIComponent).join("/")}`;
          }
        }
      }
    } catch { /* asked again */ }
    if (!over) setTimeout(() => follow(place), 1000);
  }

  for (const place of document.querySelectorAll("[data-pictures][data-job]")) follow(place);
})();
