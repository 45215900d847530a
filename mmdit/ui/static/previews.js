"use strict";
// The timeline of previews, and the state of the run, which is asked for while the page is open.
(() => {
  const section = document.getElementById("previews");
  const run = section.dataset.run;
  let previews = JSON.parse(section.dataset.previews);
  const find = (id) => document.getElementById(id);
  const [slider, follow] = [find("slider"), find("follow")];
  const address = (preview, file) =>
    `/files/${run.split("/").map(encodeURIComponent).join("/")}/samples/${preview.folder}/${file}`;

  function show(element, source) {
    element.hidden = !source;
    if (!source) element.removeAttribute("src");
    else if (element.getAttribute("src") !== source) element.src = source;
  }

  function update() {
    section.querySelector(".empty").hidden = previews.length > 0;
    section.querySelector(".timeline").hidden = previews.length === 0;
    if (!previews.length) return;
    slider.max = previews.length - 1;
    if (follow.checked) slider.value = previews.length - 1;
    const preview = previews[Number(slider.value)];
    find("shown-step").textContent = preview.step;
    show(find("grid"), address(preview, "grid.png"));
    const moving = preview.video ? address(preview, preview.video) : null;
    const film = moving && moving.endsWith(".mp4");
    show(find("video"), film ? moving : null);
    show(find("animation"), moving && !film ? moving : null);
  }

  slider.addEventListener("input", () => { follow.checked = false; update(); });
  follow.addEventListener("change", update);
  update();

  async function refresh() {
    try {
      const answer = await fetch(`/api/runs?${new URLSearchParams({ run })}`);
      if (answer.ok) {
        const [row] = await answer.json();
        const badge = document.querySelector("#state .state");
        badge.textContent = row.state;
        badge.className = `state ${row.state}`;
        const reason = document.querySelector("#state .reason");
        if (reason) reason.textContent = row.reason;
        find("step").textContent = row.step === null ? "–" : row.step;
        find("phase").textContent = row.phase;
        previews = row.previews;
        update();
      }
    } catch { /* asked again */ }
    setTimeout(refresh, document.hidden ? 15000 : 3000);
  }
  setTimeout(refresh, 1500);
})();
