// Networks in the browser: their files, the runtime that computes them, and work that keeps up with the reader.

// For use without a network, copy ort.wasm.bundle.min.mjs and ort-wasm-simd-threaded.wasm beside the page, and write
// "./" here.
const RUNTIME = "https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/";

// What went wrong, as the name of a message and what it is about.
export class Failure extends Error {
  constructor(reason, what = "") {
    super(`${reason} ${what}`);
    Object.assign(this, { reason, what });
  }
}

async function request(url) {
  const response = await fetch(url).catch(() => null);
  if (!response?.ok) throw new Failure("missing", url);
  if (response.headers.get("content-type")?.includes("text/html")) throw new Failure("other", url);
  return response;
}

export const json = async (url) => (await request(url)).json();

// The bytes of a file. progress is called with how many there are so far.
export async function bytes(url, progress = () => {}) {
  const reader = (await request(url)).body.getReader();
  const parts = [];
  for (let sum = 0; ; progress(sum)) {
    const { done, value } = await reader.read().catch(() => { throw new Failure("missing", url); });
    if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
    parts.push(value);
    sum += value.length;
  }
}

export const once = (work) => {
  let result;
  return (...args) => (result ??= work(...args));
};

const runtime = once(async (progress) => {
  if (typeof WebAssembly === "undefined") throw new Failure("wasm");
  const code = `${RUNTIME}ort.wasm.bundle.min.mjs`;
  const ort = await import(code).catch(() => { throw new Failure("missing", code); });
  ort.env.wasm.numThreads = 1; // more would need special headers of the server
  const url = `${RUNTIME}ort-wasm-simd-threaded.wasm`;
  const binary = await bytes(url, (sum) => progress("runtime", sum));
  if (String.fromCharCode(...binary.subarray(0, 4)) !== "\0asm") throw new Failure("other", url);
  ort.env.wasm.wasmBinary = binary;
  return ort;
});

// One network computes at a time, since there is one thread.
let running = Promise.resolve();

// A network that web/export.py wrote: what it says of itself, and what to call.
//
// model(x, t, y, d) -> out, as in diffusion.js; model.ms is how long the last call took.
// maps(x, t, y) -> [out, maps], with the attention maps (B, depth, heads, N, N).
async function open(name, progress) {
  const [ort, about] = [await runtime(progress), await json(`${name}.json`)];
  const file = await bytes(`${name}.onnx`, (sum) => progress("network", sum, about.bytes));
  progress("start");
  const session = await ort.InferenceSession.create(file)
    .catch(() => { throw new Failure("damaged", `${name}.onnx`); });

  const run = (outputs, x, t, y, d) => {
    const filled = (value) => new ort.Tensor("float32", new Float32Array(y.length).fill(value), [y.length]);
    const feeds = { x: new ort.Tensor("float32", x, [y.length, 1, 28, 28]), t: filled(t) };
    // A network of fewer classes than the page has buttons takes the others for its null class.
    const labels = y.map((label) => Math.min(label, about.num_classes));
    feeds.y = new ort.Tensor("int32", Int32Array.from(labels), [y.length]);
    if (session.inputNames.includes("d")) feeds.d = filled(d);
    running = running.catch(() => {}).then(async () => {
      const start = performance.now();
      const results = await session.run(feeds, outputs);
      model.ms = performance.now() - start;
      return outputs.map((output) => results[output].data);
    });
    return running;
  };
  const model = async (...inputs) => (await run(["out"], ...inputs))[0];
  return { about, model, maps: (...inputs) => run(["out", "maps"], ...inputs) };
}

// Each network is loaded once, when it is first asked for. All who ask have progress(what, bytes, of how many) called.
const networks = {};
const watchers = {};
export function load(name, progress) {
  (watchers[name] ??= []).push(progress);
  return (networks[name] ??= open(name, (...news) => watchers[name].forEach((watcher) => watcher(...news))));
}

export const frame = () => new Promise(requestAnimationFrame);

// A function that asks for work and returns at once. The work is done at most once a frame and never queued: whatever
// has changed meanwhile, the next round sees only the latest. The work can ask whether it has been overtaken.
export function latest(work) {
  let wanted = false, busy = false;
  return async () => {
    wanted = true;
    if (busy) return;
    busy = true;
    try {
      while (wanted) {
        await frame();
        wanted = false;
        await work(() => wanted);
      }
    } finally {
      busy = false;
    }
  };
}
