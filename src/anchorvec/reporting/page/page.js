"use strict";
// Each chart is drawn where it stands, from the specification beside it. `ast`: expressions are interpreted, not
// compiled, since the page's policy allows no code but its own.
for (const place of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(document.getElementById(place.dataset.spec).textContent);
  vegaEmbed(place, spec, { actions: false, renderer: "svg", ast: true })
    .then(() => place.classList.add("drawn"))
    .catch(console.error);
}
