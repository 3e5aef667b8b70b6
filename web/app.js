// The page: its state, which is also in its address; its controls, which change the state; and its sections, which show
// it. Each section loads the networks that it needs when it comes near.

import {
  Diffusion, PIXELS, dpm_solver, edit_timesteps, guide, image_noise, shortcut, shortcut_timesteps, slerp,
  spaced_timesteps,
} from "./diffusion.js";
import { brush, decode, encode, normalized, paint } from "./drawing.js";
import { bytes, frame, json, latest, load, once } from "./network.js";
import { STRINGS } from "./strings.js";

const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const range = (n) => Array.from({ length: n }, (_, i) => i);
const DIGITS = range(10);
const SEEDS = 1000;
const clamp = (v, low = 0, high = 1) => Math.min(high, Math.max(low, v));
const UNFIT = 0.5; // from here on, strokes count as not fitting a label, see sections.begin

// --------------------------------------------------------------------------------------------------------------- state

const REAL = 5; // real digits a class, in digits.bin
const STATE = { // of each section, at first
  pad: { label: 3, noise: 0, x: 0.5, y: 0.5 },
  scrub: { real: 4, which: 0, t: 600, own: "" },
  rows: { shared: 0 },
  guidance: { guided: 0, scale: 1, low: 0, high: 999 },  // the last three are the network's own, see start
  begin: { part: "UVWRYOcMfLjMnOpRrVrYpc", rest: 0 },    // an arc, as an example
  sdedit: { sketch: "fPvwPwfP", strength: 0.75, under: 0 }, // a triangle
  look: { inside: 8, inside_t: 500, block: 2, patch: 5 },
};
const LARGEST = {
  label: 9, noise: SEEDS, x: 1, y: 1, real: 9, which: REAL - 1, t: 999, shared: SEEDS, guided: SEEDS, scale: 4,
  low: 999, high: 999, rest: SEEDS, strength: 1, under: SEEDS, inside: 9, inside_t: 999, block: 4, patch: 15,
};
const SECTION_OF = Object.fromEntries(
  Object.entries(STATE).flatMap(([section, keys]) => Object.keys(keys).map((key) => [key, section])));
const DEFAULTS = Object.assign({ lang: navigator.language.startsWith("zh") ? "zh" : "en" }, ...Object.values(STATE));
const state = { ...DEFAULTS };

function read_address() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  for (const [key, value] of Object.entries(DEFAULTS)) {
    const text = given[key] ?? value;
    state[key] = value;
    if (key === "lang") state[key] = Object.hasOwn(STRINGS, text) ? text : value;
    else if (typeof value === "string") state[key] = encode(decode(text));
    else if (Number.isFinite(Number(text))) state[key] = fitting(key, Number(text));
  }
}

function fitting(key, value) {
  const digits = ["x", "y", "scale", "strength"].includes(key) ? 1000 : 1;
  return clamp(Math.round(value * digits) / digits, 0, LARGEST[key]);
}

let writing;
function write_address() { // not at each move, since browsers limit how often
  clearTimeout(writing);
  writing = setTimeout(() => {
    const changed = Object.entries(state).filter(([key, value]) => key === "lang" || value !== DEFAULTS[key]);
    history.replaceState(null, "", `#${new URLSearchParams(changed)}`);
  }, 200);
}

function set(changes) {
  for (const [key, value] of Object.entries(changes)) state[key] = key in LARGEST ? fitting(key, value) : value;
  show_controls();
  write_address();
  for (const name of new Set(Object.keys(changes).map((key) => SECTION_OF[key]))) refresh[name]?.();
}

// ------------------------------------------------------------------------------------------------------------ language

const say = (name, ...what) => STRINGS[state.lang][name](...what);

function show_language() {
  document.documentElement.lang = state.lang === "zh" ? "zh-CN" : "en";
  document.title = $(`h1 [lang=${state.lang}]`).textContent;
  for (const element of $$("[data-label]")) {
    const text = STRINGS[state.lang][element.dataset.label];
    element.setAttribute(element.tagName === "IMG" ? "alt" : "aria-label", text);
  }
  for (const group of $$(".digits")) {
    for (const button of group.children) {
      button.setAttribute("aria-label", `${STRINGS[state.lang][group.dataset.state]} ${button.textContent}`);
    }
  }
  for (const section of $$("section")) show_status(section);
}

// What each section waits for, or why it does not work: [name of a message, ...what it is about].
const statuses = {};
function show_status(section) {
  const [name, ...what] = statuses[section.id] ?? [];
  const element = $(".status", section);
  element.textContent = name ? say(name, ...what) : "";
  element.classList.toggle("failed", ["wasm", "missing", "other", "damaged", "failed"].includes(name));
}

function status(section, ...news) {
  statuses[section.id] = news;
  show_status(section);
}

// ------------------------------------------------------------------------------------------------------------ controls

function show_controls() {
  for (const slider of $$("input[data-state]")) slider.value = state[slider.dataset.state];
  for (const output of $$("output[data-value]")) output.textContent = state[output.dataset.value];
  for (const group of $$(".digits")) {
    [...group.children].forEach((button, i) => button.setAttribute("aria-pressed", i === state[group.dataset.state]));
  }
  $(".knob").style.left = `${100 * state.x}%`;
  $(".knob").style.top = `${100 * state.y}%`;
}

function add_buttons(group) {
  const key = group.dataset.state;
  group.replaceChildren(...range(LARGEST[key] + 1).map((i) => {
    const textContent = key === "block" ? i + 1 : i;
    const button = Object.assign(document.createElement("button"), { type: "button", textContent });
    button.onclick = () => choose(key, i);
    return button;
  }));
}

function choose(key, value) { // a real digit that is chosen again is another one, and replaces a drawing
  const another = key === "real" && value === state.real && !state.own;
  set({ [key]: value, ...(key === "real" ? { own: "", which: another ? (state.which + 1) % REAL : 0 } : {}) });
}

// Calls move([x, y]) with where the pointer is, each from 0 to 1, and before that begin() when it is pressed.
function follow(surface, move, { begin = () => {}, hovering = true } = {}) {
  const place = (event) => {
    const box = surface.getBoundingClientRect();
    move([clamp((event.clientX - box.left) / box.width), clamp((event.clientY - box.top) / box.height)]);
  };
  surface.onpointerdown = (event) => {
    surface.setPointerCapture(event.pointerId);
    begin();
    place(event);
  };
  surface.onpointermove = (event) => {
    if (!surface.hasPointerCapture(event.pointerId) && !(hovering && event.pointerType === "mouse")) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const each of hovering || !events.length ? [event] : events) place(each);
  };
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// Calls move([dx, dy]) for the arrow keys.
function follow_arrows(surface, move) {
  surface.addEventListener("keydown", (event) => {
    if (!(event.key in ARROWS)) return;
    event.preventDefault();
    move(ARROWS[event.key]);
  });
}

// A surface whose strokes are in state[key].
function drawable(surface, key) {
  let strokes = [], pen = [0.5, 0.25], down = false;
  const begin = () => { // the first stroke replaces the example
    strokes = [...(state[key] === DEFAULTS[key] ? [] : decode(state[key])), []];
  };
  const move = (point) => {
    pen = point;
    const stroke = strokes.at(-1);
    const [x, y] = stroke.at(-1) ?? [2, 2];
    if (Math.hypot(point[0] - x, point[1] - y) < 1 / 32) return;
    stroke.push(point);
    set({ [key]: encode(strokes) });
  };
  follow(surface, move, { begin, hovering: false });
  follow_arrows(surface, ([dx, dy]) => {
    pen = [clamp(pen[0] + dx / 28), clamp(pen[1] + dy / 28)];
    if (down) move(pen);
    refresh[SECTION_OF[key]]();
  });
  surface.addEventListener("keydown", (event) => {
    if (event.key !== " ") return;
    event.preventDefault();
    down = !down;
    if (down) { begin(); move(pen); }
    refresh[SECTION_OF[key]]();
  });
  surface.addEventListener("focus", () => refresh[SECTION_OF[key]]?.());
  surface.addEventListener("blur", () => { down = false; refresh[SECTION_OF[key]]?.(); });
  // Shows an image, and for those who draw by keys the pen.
  return (image) => {
    const [px, py] = pen.map((v) => Math.min(27, Math.floor(28 * v)));
    const visible = surface.matches(":focus-visible");
    const color = down ? [240, 120, 45] : [64, 170, 255];
    paint($("canvas", surface), image, 0, (v, x, y) => (visible && x === px && y === py ? color : [v, v, v]));
  };
}

// The section that digit keys act on: that of the focus, or else the one in the middle of the window.
function current_section() {
  const focused = document.activeElement?.closest?.("section");
  const middle = (section) => {
    const box = section.getBoundingClientRect();
    return Math.abs((box.top + box.bottom - innerHeight) / 2);
  };
  return focused ?? $$("section").reduce((a, b) => (middle(b) < middle(a) ? b : a));
}

// ------------------------------------------------------------------------------------------------------------ sections

// real(label, which) -> a real digit
const real_digits = once(async () => {
  const digits = Float32Array.from(await bytes("digits.bin"), (v) => v / 127.5 - 1);
  return (label, which) => digits.subarray((label * REAL + which) * PIXELS, (label * REAL + which + 1) * PIXELS);
});
const EPS = image_noise(SEEDS + 1); // the noise under which real digits are shown
const NEIGHBOURS = [-29, -28, -27, -1, 0, 1, 27, 28, 29]; // of a pixel, and itself
const copies = (image, n) => {
  const all = new Float32Array(n * image.length);
  for (const i of range(n)) all.set(image, i * image.length);
  return all;
};
const milliseconds = (ms) => (ms < 10 ? ms.toFixed(1) : ms.toFixed(0));
const paint_all = (strip, images) => $$("canvas", strip).forEach((canvas, i) => paint(canvas, images, i));

async function last(steps) {
  let x0_hat;
  for await (x0_hat of steps);
  return x0_hat;
}

// Each becomes a function that shows the section, once its networks are there. It gets these networks, by name, and
// returns a function that is called, with one that says whether it is overtaken, whenever the state has changed.
const sections = {
  pad({ fast }) {
    const one_step = (x, labels) =>
      last(shortcut(fast.diffusion, fast.model, labels, x, shortcut_timesteps(fast.diffusion.T, 1)));
    let shown, noises;
    return async () => {
      if (shown !== `${state.label} ${state.noise}`) {
        shown = `${state.label} ${state.noise}`;
        const all = image_noise(state.noise, 4);
        noises = range(4).map((i) => all.subarray(i * PIXELS, (i + 1) * PIXELS));
        const corners = await one_step(all, Array(4).fill(state.label));
        $$(".corner").forEach((canvas, i) => paint(canvas, corners, i));
      }
      const [top, bottom] = [slerp(noises[0], noises[1], state.x), slerp(noises[2], noises[3], state.x)];
      const x = slerp(top, bottom, state.y);
      const digit = await one_step(x, [state.label]);
      $("#pad-ms").textContent = milliseconds(fast.model.ms);
      paint($(".noise"), x.map((v) => v / 4));
      paint($("#digit"), digit);
    };
  },

  async scrub({ full }) {
    const real = await real_digits();
    const { alpha, sigma, T } = full.diffusion;
    for (const [name, values] of Object.entries({ alpha, sigma })) {
      const points = range(T).map((t) => `${(1000 * t) / (T - 1)},${195 - 190 * values[t]}`);
      $(`#curves .${name}`).setAttribute("d", `M${points.join("L")}`);
    }
    const show_own = drawable($("#own"), "own");
    return async () => {
      const strokes = decode(state.own);
      const x0 = strokes.length ? brush(normalized(strokes)).image : real(state.real, state.which);
      const x_t = full.diffusion.q_sample(x0, state.t, EPS);
      show_own(strokes.length ? brush(strokes).image : x0);
      paint($("#noisy"), x_t);
      $("#alpha").textContent = alpha[state.t].toFixed(2);
      $("#sigma").textContent = sigma[state.t].toFixed(2);
      for (const end of ["x1", "x2"]) $("#curves .mark").setAttribute(end, (1000 * state.t) / (T - 1));
      const out = await full.model(x_t, state.t, [full.about.num_classes]);
      paint($("#predicted"), full.diffusion.predict_x0(out, x_t, state.t));
    };
  },

  rows(networks) {
    const steps_of = (name, steps, x) => {
      const { diffusion, model, about } = networks[name];
      if (name === "fast") return shortcut(diffusion, model, DIGITS, x, shortcut_timesteps(diffusion.T, steps));
      const predict = guide(model, DIGITS, about.num_classes, about.guidance, about.interval);
      return dpm_solver(diffusion, predict, x, spaced_timesteps(diffusion.T, Math.min(steps, diffusion.T)));
    };
    return async (overtaken) => {
      const x = image_noise(state.shared, 10);
      for (const strip of $$("[data-row]")) {
        const [name, steps] = strip.dataset.row.split(" ");
        let ms = 0;
        for await (const x0_hat of steps_of(name, Number(steps), x)) {
          ms += networks[name].model.ms;
          paint_all(strip, x0_hat);
          await frame();
          if (overtaken()) return;
        }
        $("output", strip.parentElement).textContent = milliseconds(ms);
      }
    };
  },

  guidance({ full }) {
    const T = full.diffusion.T;
    const timesteps = spaced_timesteps(T, Math.min(20, T));
    const show_timeline = (now) => {
      const at = (t) => (1000 * t) / (T - 1);
      const inside = (t) => state.low <= t && t <= state.high;
      const marks = timesteps.map((t) => `<line class="${inside(t) ? "inside" : ""} ${t === now ? "now" : ""}"
        x1="${at(t)}" x2="${at(t)}" y1="${t === now ? 0 : 12}" y2="${t === now ? 40 : 28}"/>`);
      const [x, width] = [at(state.low), at(state.high) - at(state.low)];
      $("#timeline").innerHTML = `<rect x="${x}" y="8" width="${width}" height="24"/>${marks.join("")}`;
    };
    return async (overtaken) => {
      const predict = guide(full.model, DIGITS, full.about.num_classes, state.scale, [state.low, state.high]);
      const steps = dpm_solver(full.diffusion, predict, image_noise(state.guided, 10), timesteps);
      let ms = 0, i = 0;
      for await (const x0_hat of steps) {
        ms += full.model.ms;
        paint_all($("#guided"), x0_hat);
        show_timeline(timesteps[i++]);
        await frame();
        if (overtaken()) return;
      }
      show_timeline();
      $("#guided-ms").textContent = milliseconds(ms);
    };
  },

  begin({ fast }) {
    const { T } = fast.diffusion;
    const timesteps = shortcut_timesteps(T, 4);
    const show_part = drawable($("#part"), "part");
    const cells = $("#begin .fives");

    // How badly the strokes fit each label, (10,): for each completed image, put under noise again, how black the
    // network expects it to be there. So strokes may be a pixel away from where it expects them. Of halves of real
    // digits, one in twenty is beyond UNFIT with its own label, and four in ten with others, some of which do fit.
    async function misfit(images, mask) {
      const errors = Array(10).fill(0), noises = 4, [t, s] = [timesteps[1], timesteps[2]];
      const stroke = range(PIXELS).filter((p) => mask[p]);
      for (const noise of range(noises)) {
        const x_t = fast.diffusion.q_sample(images, t, copies(image_noise(noise), 10));
        const x0_hat = fast.diffusion.predict_x0(await fast.model(x_t, t, DIGITS, t - s), x_t, t);
        const brightest = (i) => Math.max(...NEIGHBOURS.map((step) => x0_hat[i + step] ?? -1));
        for (const label of DIGITS) {
          for (const p of stroke) {
            const i = label * PIXELS + p;
            errors[label] += Math.max(0, images[i] - brightest(i)) ** 2 / stroke.length / noises;
          }
        }
      }
      return errors;
    }

    return async (overtaken) => {
      const { image, mask } = brush(decode(state.part));
      show_part(image);
      const keep = (x0_hat) => x0_hat.map((v, i) => (mask[i % PIXELS] ? image[i % PIXELS] : clamp(v, -1)));
      let ms = 0, images;
      const noise = image_noise(state.rest, 10);
      for await (images of shortcut(fast.diffusion, fast.model, DIGITS, noise, timesteps, keep)) {
        ms += fast.model.ms;
        paint_all(cells, images);
        await frame();
      }
      $("#begin-ms").textContent = milliseconds(ms);
      if (overtaken()) return;
      const errors = state.part ? await misfit(images, mask) : Array(10).fill(0);
      [...cells.children].forEach((cell, i) => cell.classList.toggle("unfit", errors[i] > UNFIT));
    };
  },

  sdedit({ full }) {
    const { diffusion, model, about } = full;
    const show_sketch = drawable($("#sketch"), "sketch");
    const predict = guide(model, DIGITS, about.num_classes, about.guidance, about.interval);
    let shown;
    return async (overtaken) => {
      const { image } = brush(decode(state.sketch));
      show_sketch(image);
      const timesteps = edit_timesteps(diffusion.T, state.strength, 20);
      $("#from").textContent = timesteps[0];
      const wanted = `${state.sketch} ${state.strength} ${state.under}`;
      if (shown === wanted) return; // only the pen has moved
      const x_t = diffusion.q_sample(image, timesteps[0], image_noise(state.under)); // the same for all labels
      let ms = 0;
      for await (const x0_hat of dpm_solver(diffusion, predict, copies(x_t, 10), timesteps)) {
        ms += model.ms;
        paint_all($("#sdedit .fives"), x0_hat);
        await frame();
        if (overtaken()) return;
      }
      $("#sdedit-ms").textContent = milliseconds(ms);
      shown = wanted;
    };
  },

  async look({ full }) {
    const real = await real_digits();
    const { patch_size, num_heads } = full.about;
    const side = 28 / patch_size, N = side * side;
    $(".heads").innerHTML = range(num_heads).map((head) => `<figure><div class="framed"><canvas></canvas></div>
      <figcaption><span lang="en">head</span><span lang="zh">头</span> ${head + 1}</figcaption></figure>`).join("");
    const surface = $("#patches");
    const choose_patch = (x, y) => set({ patch: clamp(y, 0, side - 1) * side + clamp(x, 0, side - 1) });
    follow(surface, ([x, y]) => choose_patch(Math.floor(x * side), Math.floor(y * side)));
    follow_arrows(surface, ([dx, dy]) => choose_patch((state.patch % side) + dx, Math.floor(state.patch / side) + dy));
    return async () => {
      const x_t = full.diffusion.q_sample(real(state.inside, 0), state.inside_t, EPS);
      const [out, maps] = await full.maps(x_t, state.inside_t, [state.inside]);
      const x0_hat = full.diffusion.predict_x0(out, x_t, state.inside_t);
      paint($("canvas", surface), x_t);
      const place = { side, column: state.patch % side, row: Math.floor(state.patch / side) };
      for (const [name, value] of Object.entries(place)) $("#look").style.setProperty(`--${name}`, value);
      $$(".heads figure").forEach((figure, head) => {
        const row = ((state.block * num_heads + head) * N + state.patch) * N; // what this patch takes from each
        paint($("canvas", figure), x0_hat, 0, (grey, x, y) => {
          const weight = Math.sqrt(maps[row + Math.floor(y / patch_size) * side + Math.floor(x / patch_size)]);
          return [64, 170, 255].map((blue) => Math.round(0.35 * grey * (1 - weight) + blue * weight));
        });
      });
    };
  },
};

// A section, once it has come near and its networks are loaded, has a function here that shows it again.
const refresh = {};

async function open_section(section) {
  const names = section.dataset.networks.split(" ");
  try {
    const megabytes = (n) => (n / 1e6).toFixed(1);
    const progress = (what, ...sizes) => status(section, what, ...sizes.map(megabytes));
    const opened = await Promise.all(names.map((name) => load(name, progress)));
    for (const network of opened) network.diffusion ??= new Diffusion(network.about);
    const show = await sections[section.id](Object.fromEntries(names.map((name, i) => [name, opened[i]])));
    refresh[section.id] = latest((overtaken) => show(overtaken).catch((error) => fail(section, error)));
    status(section);
    section.classList.add("ready");
    refresh[section.id]();
  } catch (error) {
    fail(section, error);
  }
}

function fail(section, { reason = "failed", what, message }) {
  status(section, reason, what ?? message);
}

// ---------------------------------------------------------------------------------------------------------- the start

async function start() {
  for (const strip of $$(".strip")) strip.innerHTML = "<canvas></canvas>".repeat(10);
  for (const labels of $$(".labels")) labels.innerHTML = DIGITS.map((i) => `<span>${i}</span>`).join("");
  for (const fives of $$(".fives")) {
    fives.innerHTML = DIGITS.map((i) => `<figure><canvas></canvas><figcaption>${i}</figcaption></figure>`).join("");
  }
  for (const caption of $$("#begin .fives figcaption")) {
    caption.innerHTML += '<span class="why"><span lang="en">does not fit</span><span lang="zh">不合</span></span>';
  }

  const about = await json("full.json").catch(() => null); // where it is missing, the sections that need it say so
  if (about) {
    const last = about.timesteps - 1, [low, high] = about.interval ?? [0, last];
    Object.assign(DEFAULTS, { scale: about.guidance, low, high });
    Object.assign(LARGEST, { t: last, inside_t: last, low: last, high: last });
    Object.assign(LARGEST, { block: about.depth - 1, patch: (28 / about.patch_size) ** 2 - 1 });
  }
  for (const group of $$(".digits")) add_buttons(group);
  for (const slider of $$("input[data-state]")) slider.max = LARGEST[slider.dataset.state];
  read_address();
  show_language();
  show_controls();

  for (const slider of $$("input[data-state]")) {
    slider.oninput = () => {
      const [key, value] = [slider.dataset.state, Number(slider.value)];
      const other = { low: { high: Math.max(value, state.high) }, high: { low: Math.min(value, state.low) } }[key];
      set({ [key]: value, ...other });
    };
  }
  for (const button of $$("[data-next]")) {
    const key = button.dataset.next;
    button.onclick = () => (key === "which" ? choose("real", state.real) : set({ [key]: (state[key] + 1) % SEEDS }));
  }
  for (const button of $$("[data-clear]")) button.onclick = () => set({ [button.dataset.clear]: "" });
  $("#language").onclick = () => { set({ lang: state.lang === "en" ? "zh" : "en" }); show_language(); };
  $("#theme").onclick = () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark"
      || (!document.documentElement.style.colorScheme && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.style.colorScheme = dark ? "light" : "dark";
  };
  follow($("#field"), ([x, y]) => set({ x, y }));
  follow_arrows($("#field"), ([dx, dy]) => set({ x: state.x + 0.02 * dx, y: state.y + 0.02 * dy }));
  document.addEventListener("keydown", (event) => {
    if (!/^[0-9]$/.test(event.key) || event.ctrlKey || event.altKey || event.metaKey) return;
    const key = { pad: "label", scrub: "real", look: "inside" }[current_section().id];
    if (key) choose(key, Number(event.key));
  });
  addEventListener("hashchange", () => {
    read_address();
    show_language();
    show_controls();
    for (const show of Object.values(refresh)) show();
  });

  const approach = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      approach.unobserve(target);
      open_section(target);
    }
  }, { rootMargin: "300px" });
  for (const section of $$("section")) approach.observe(section);
}

start();
