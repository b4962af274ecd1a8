"use strict";

const badness = {
  higher: (value) => -value,
  lower: (value) => value,
  one: (value) => Math.abs(value - 1),
  neither: (value) => -value,
};
const cards = [...document.querySelectorAll(".card")];
const sortMetric = document.getElementById("sort-metric");
const sortModel = document.getElementById("sort-model");

function sortCards() {
  const { value: metric, selectedOptions: [option] } = sortMetric;
  const model = sortModel.value;
  const valueOf = (card) => (JSON.parse(card.dataset.values)[model] ?? {})[metric];
  const rank = (card) => {
    const value = valueOf(card);
    return value === undefined ? Infinity : -badness[option.dataset.better](value);
  };
  const holder = document.getElementById("cards");
  cards.sort((a, b) => rank(a) - rank(b)).forEach((card) => holder.append(card));
  for (const card of cards) {
    const value = valueOf(card);
    const text = value === undefined ? "" : `${model}: ${option.textContent} ${Number(value.toPrecision(4))}`;
    card.querySelector(".numbers").textContent = text;
  }
}

function equip(card) {
  const stage = card.querySelector(".stage");
  const split = card.querySelector(".split");
  const [left, right] = [".choose-left", ".choose-right"].map((s) => card.querySelector(s));
  const error = card.querySelector(".show-error");
  const view = { zoom: 1, x: 0, y: 0 }; // x, y: upper left corner as a share of the picture

  function show() {
    const limit = 1 - 1 / view.zoom;
    view.x = Math.min(Math.max(view.x, 0), limit);
    view.y = Math.min(Math.max(view.y, 0), limit);
    const share = Number(split.value) / 100;
    // The clip belongs to the picture, which is scaled and moved after it.
    const cut = view.x + share / view.zoom;
    stage.style.setProperty("--cut", `${cut * 100}%`);
    stage.style.setProperty("--split", `${share * 100}%`);
    stage.style.setProperty("--zoom", view.zoom);
    stage.style.setProperty("--x", view.x);
    stage.style.setProperty("--y", view.y);
    stage.classList.toggle("zoomed", view.zoom > 1);
    stage.classList.toggle("pixels", view.zoom >= 2);
    const isError = error !== null && error.checked && right.value !== "original";
    for (const image of stage.querySelectorAll("img")) {
      const name = isError ? image.dataset.error : image.dataset.name;
      image.classList.toggle("left", image.dataset.name === left.value);
      image.classList.toggle("right", name === right.value);
    }
    stage.querySelector(".on-left").textContent = left.value;
    stage.querySelector(".on-right").textContent = isError ? `error of ${right.value}` : right.value;
    for (const button of card.querySelectorAll("[data-zoom]")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.zoom) === view.zoom));
    }
  }

  function zoomTo(zoom, centreX, centreY) {
    Object.assign(view, { zoom, x: centreX - 0.5 / zoom, y: centreY - 0.5 / zoom });
    show();
  }
  const centre = () => [view.x + 0.5 / view.zoom, view.y + 0.5 / view.zoom];

  for (const button of card.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => zoomTo(Number(button.dataset.zoom), ...centre()));
  }
  card.querySelector(".to-crop").addEventListener("click", () => {
    const place = card.querySelector(".crop-place").dataset;
    const image = stage.querySelector("img");
    const [width, height] = [image.getAttribute("width"), image.getAttribute("height")].map(Number);
    const x = (Number(place.left) + Number(place.width) / 2) / width;
    const y = (Number(place.top) + Number(place.height) / 2) / height;
    zoomTo(Math.min(8, Math.max(1, width / Number(place.width))), x, y);
  });
  stage.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && view.zoom === 1) return; // the page scrolls; Ctrl or a pinch zooms
    event.preventDefault();
    const box = stage.getBoundingClientRect();
    const [u, v] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    const zoom = Math.min(16, Math.max(1, view.zoom * Math.exp(-event.deltaY / 300)));
    view.x += u / view.zoom - u / zoom;
    view.y += v / view.zoom - v / zoom;
    view.zoom = zoom;
    show();
  }, { passive: false });
  stage.addEventListener("dblclick", (event) => {
    const box = stage.getBoundingClientRect();
    const x = view.x + (event.clientX - box.left) / box.width / view.zoom;
    const y = view.y + (event.clientY - box.top) / box.height / view.zoom;
    zoomTo(view.zoom === 1 ? 4 : 1, x, y);
  });
  stage.addEventListener("pointermove", (event) => {
    if (event.buttons !== 1 || view.zoom === 1) return;
    const box = stage.getBoundingClientRect();
    view.x -= event.movementX / box.width / view.zoom;
    view.y -= event.movementY / box.height / view.zoom;
    show();
  });
  stage.addEventListener("pointerdown", (event) => {
    if (view.zoom > 1) stage.setPointerCapture(event.pointerId);
  });
  for (const control of [split, left, right, error]) {
    if (control !== null) control.addEventListener("input", show);
  }
  show();
}

cards.forEach(equip);
sortCards();
sortMetric.addEventListener("input", sortCards);
sortModel.addEventListener("input", sortCards);
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
