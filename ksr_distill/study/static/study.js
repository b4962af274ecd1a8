"use strict";
// One page, one pair at a time. Votes go through an outbox in localStorage: a vote leaves it only when
// the server has said that it is stored, so a lost connection, a crash or a closed tab costs nothing, and
// the vote's own id keeps a repeated one from counting twice.

const byId = (id) => document.getElementById(id);
const rater = document.body.dataset.rater;
const images = { left: byId("left"), right: byId("right") };
const views = [...document.querySelectorAll(".view")];
const SIGNED_OUT = "You are signed out. Open your personal link; your answers wait here.";
const MIN_LOOK_MS = 250; // a key still held from the last pair is no judgement

let queue = [];        // pairs to judge; the first is on screen
let last = null;       // {id, item}: what undo takes back
let current = null;    // the item on screen, once both pictures are decoded
let target = null;     // its number, from the moment it begins to load
let shownAt = 0;
let flushing = false;

// ---------------------------------------------------------------- outbox
const BOX = `ksr-study:${rater}:`;
const boxKeys = () => Object.keys(localStorage).filter((key) => key.startsWith(BOX)).sort();
let sequence = 0;

function post(path, body) {
  const order = `${String(Date.now()).padStart(15, "0")}-${String(sequence++).padStart(6, "0")}`;
  localStorage.setItem(`${BOX}${order}`, JSON.stringify({ path, body }));
  flush();
}

async function flush() {
  if (flushing) return;
  flushing = true;
  let wait = 500;
  let outcome = "stored";
  let refused = false;
  for (let keys = boxKeys(); keys.length && outcome !== "signed out"; keys = boxKeys()) {
    outcome = await send(keys[0]);
    if (outcome === "again") {
      byId("saving").textContent = `offline: ${keys.length} not saved yet, trying again …`;
      await new Promise((wake) => setTimeout(wake, wait));
      wait = Math.min(wait * 2, 8000);
    } else if (outcome === "refused") {
      localStorage.removeItem(keys[0]);
      refused = true;
    }
  }
  byId("saving").textContent = "";
  flushing = false;
  if (outcome === "signed out") curtain(SIGNED_OUT);
  else if (refused) await refresh(); // show what the server thinks is next
}

async function send(key) {
  const entry = localStorage.getItem(key);
  if (!entry) return "stored"; // by another tab
  const { path, body } = JSON.parse(entry);
  try {
    const response = await fetch(path, {
      method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" },
    });
    if (response.status === 401) return "signed out"; // the vote waits for the personal link
    if (response.status >= 500 || response.status === 429) return "again";
    const answer = await response.json();
    if (!response.ok) {
      console.warn(answer.error);
      return "refused";
    }
    localStorage.removeItem(key);
    accept(answer);
    return "stored";
  } catch {
    return "again";
  }
}

// ---------------------------------------------------------------- state
function accept(state) {
  const progress = state.progress;
  const share = progress.limit ? progress.mine / progress.limit : progress.given / progress.wanted;
  byId("bar").value = Math.min(1, share);
  byId("progress").textContent = progress.limit
    ? `${progress.mine} of ${progress.limit}`
    : `yours ${progress.mine} · study ${Math.floor(100 * Math.min(1, share))} %`;
  if (boxKeys().length) return; // newer votes are under way; their answers will say more
  last = state.last;
  queue = state.queue;
  byId("undo").disabled = !last;
  if (!queue.length) finish();
  else if (target !== queue[0].pair) show(queue[0]);
  preload();
}

async function refresh() {
  for (let wait = 500; ; wait = Math.min(wait * 2, 8000)) {
    try {
      const response = await fetch("/api/queue");
      if (response.status === 401) return curtain(SIGNED_OUT);
      if (response.ok) {
        target = null;
        return accept(await response.json());
      }
    } catch { /* the server is away: try again below */ }
    curtain("The study cannot be reached; trying again …");
    await new Promise((wake) => setTimeout(wake, wait));
  }
}

function curtain(text) {
  current = null;
  target = null;
  byId("message").textContent = text;
  byId("views").classList.remove("shown");
}

function finish() {
  byId("prompt").textContent = "";
  curtain("There is nothing left for you to judge now. Thank you!");
  byId("views").setAttribute("aria-busy", "false");
}

// ---------------------------------------------------------------- pictures
const address = (item, side) => `/picture/${item.pair}/${side}`;
const ahead = new Map();

function preload() {
  for (const item of queue.slice(1)) {
    if (ahead.has(item.pair)) continue;
    ahead.set(item.pair, ["left", "right"].map((side) => {
      const image = new Image();
      image.src = address(item, side);
      return image;
    }));
  }
  const wanted = new Set(queue.map((item) => item.pair));
  for (const pair of ahead.keys()) if (!wanted.has(pair)) ahead.delete(pair);
}

let showing = 0;
async function show(item) {
  const turn = ++showing;
  curtain("Loading …");
  target = item.pair;
  byId("views").setAttribute("aria-busy", "true");
  byId("prompt").textContent = item.prompt; // textContent: a prompt is text, whatever it contains
  for (const side of ["left", "right"]) {
    images[side].width = item.width;
    images[side].height = item.height;
    images[side].src = address(item, side);
  }
  try {
    await Promise.all([images.left.decode(), images.right.decode()]);
  } catch {
    if (turn !== showing) return;
    curtain("A picture did not load; trying again …");
    setTimeout(() => { if (turn === showing) refresh(); }, 2000);
    return;
  }
  if (turn !== showing) return;
  current = item;
  setView(document.body.dataset.firstView);
  byId("views").classList.add("shown");
  byId("views").setAttribute("aria-busy", "false");
  shownAt = performance.now();
}

// ---------------------------------------------------------------- votes
function vote(choice) {
  const looked = performance.now() - shownAt;
  if (!current || looked < MIN_LOOK_MS) return;
  const item = current;
  const id = uuid();
  last = { id, item };
  byId("undo").disabled = false;
  queue = queue.filter((other) => other.pair !== item.pair);
  current = null;
  if (queue.length) show(queue[0]);
  else curtain("Loading …");
  post("/api/vote", { id, pair: item.pair, choice, milliseconds: Math.round(looked) });
}

function undo() {
  if (!last) return;
  const { id, item } = last;
  last = null; // the server's answer brings the one before
  byId("undo").disabled = true;
  queue = [item, ...queue.filter((other) => other.pair !== item.pair)];
  show(item);
  post("/api/undo", { id });
}

function uuid() { // crypto.randomUUID needs https; getRandomValues does not
  return [...crypto.getRandomValues(new Uint8Array(16))].map((n) => n.toString(16).padStart(2, "0")).join("");
}

// ---------------------------------------------------------------- one view for both pictures
const view = { scale: 1, x: 0, y: 0, name: "full" }; // (x, y): the picture's point in the middle
const fitScale = () => Math.min(
  views[0].clientWidth / images.left.width, views[0].clientHeight / images.left.height,
);
const fullScale = () => 1 / window.devicePixelRatio; // one picture pixel on one screen pixel

function setView(name) {
  view.name = name;
  view.scale = name === "fit" ? fitScale() : fullScale();
  view.x = images.left.width / 2;
  view.y = images.left.height / 2;
  place();
}

function place() {
  const { clientWidth, clientHeight } = views[0];
  const inside = (centre, size, room) => {
    const half = room / 2 / view.scale;
    return half * 2 >= size ? size / 2 : Math.min(Math.max(centre, half), size - half);
  };
  view.x = inside(view.x, images.left.width, clientWidth);
  view.y = inside(view.y, images.left.height, clientHeight);
  const left = clientWidth / 2 - view.x * view.scale;
  const top = clientHeight / 2 - view.y * view.scale;
  for (const image of Object.values(images)) {
    image.style.transform = `translate(${left}px, ${top}px) scale(${view.scale})`;
  }
  byId("zoom-name").textContent = `${Math.round(100 * view.scale * window.devicePixelRatio)} %`;
  byId("zoom").setAttribute("aria-pressed", String(view.name === "full"));
}

function zoomAt(element, clientX, clientY, factor) {
  const box = element.getBoundingClientRect();
  const dx = clientX - box.left - box.width / 2;
  const dy = clientY - box.top - box.height / 2;
  const smallest = Math.min(fitScale(), fullScale());
  const scale = Math.min(Math.max(view.scale * factor, smallest), 8 * fullScale());
  view.x += dx / view.scale - dx / scale;
  view.y += dy / view.scale - dy / scale;
  view.scale = scale;
  view.name = "free";
  place();
}

const pointers = new Map();
const spread = () => {
  const [a, b] = [...pointers.values()];
  return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
};

for (const element of views) {
  element.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomAt(element, event.clientX, event.clientY, Math.exp(-event.deltaY / 400));
  }, { passive: false });
  element.addEventListener("pointerdown", (event) => {
    element.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, event);
    element.classList.add("moving");
  });
  element.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    if (pointers.size === 2) {
      const width = spread();
      pointers.set(event.pointerId, event);
      zoomAt(element, event.clientX, event.clientY, spread() / Math.max(1, width));
      return;
    }
    pointers.set(event.pointerId, event);
    view.x -= (event.clientX - before.clientX) / view.scale;
    view.y -= (event.clientY - before.clientY) / view.scale;
    place();
  });
  for (const end of ["pointerup", "pointercancel"]) {
    element.addEventListener(end, (event) => {
      pointers.delete(event.pointerId);
      element.classList.remove("moving");
    });
  }
  element.addEventListener("dblclick", toggleView);
}

function toggleView() {
  setView(view.name === "full" ? "fit" : "full");
}

// ---------------------------------------------------------------- keys and buttons
const KEYS = {
  ArrowLeft: () => vote("left"), ArrowRight: () => vote("right"),
  ArrowUp: () => vote("both"), ArrowDown: () => vote("neither"),
  z: undo, Z: undo, " ": toggleView,
};
document.addEventListener("keydown", (event) => {
  const act = KEYS[event.key];
  if (!act || event.altKey || event.metaKey) return;
  event.preventDefault();
  if (!event.repeat) act();
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => { button.blur(); vote(button.dataset.choice); });
}
byId("undo").addEventListener("click", (event) => { event.currentTarget.blur(); undo(); });
byId("zoom").addEventListener("click", (event) => { event.currentTarget.blur(); toggleView(); });
window.addEventListener("resize", () => (view.name === "free" ? place() : setView(view.name)));

flush().then(refresh);
