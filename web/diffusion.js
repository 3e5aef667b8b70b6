// The mathematics of diffusion.py, sampling.py and shortcut.py again, with the same names, for the browser.
//
// Images are Float32Arrays, (B, 28, 28) in one piece, in [-1, 1]. A network is an async function
// model(x, t, y, d) -> out, with one timestep t for the batch, labels y (an array of B), and for distilled networks
// the step size d. The samplers are async generators: each step yields its x0_hat, and the last of them is the sample.
// Who iterates may show each, and may stop at any step.

export const PIXELS = 28 * 28;

const map = (f, ...arrays) => Float32Array.from(arrays[0], (_, i) => f(...arrays.map((array) => array[i])));
const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
export const clip = (x0_hat) => x0_hat.map((v) => clamp(v, -1, 1));

// ----------------------------------------------------------------------------------------------------- noise schedules
// Each returns the lists [alpha, sigma] of T numbers.

function from_beta(beta) {
  let alpha_bar = 1;
  const bars = beta.map((b) => (alpha_bar *= 1 - Math.min(b, 0.999)));
  return [bars.map(Math.sqrt), bars.map((bar) => Math.sqrt(1 - bar))];
}

const range = (n) => Array.from({ length: n }, (_, i) => i);
const round = (v) => (v % 1 === 0.5 ? 2 * Math.round(v / 2) : Math.round(v)); // halves to the even number, as Python

export const SCHEDULES = {
  linear: (T) => from_beta(range(T).map((t) => (1e-4 + ((0.02 - 1e-4) * t) / (T - 1)) * (1000 / T))),
  cosine: (T) => {
    const f = range(T + 1).map((i) => Math.cos(((i / T + 0.008) / 1.008) * (Math.PI / 2)) ** 2);
    return from_beta(range(T).map((t) => 1 - f[t + 1] / f[t]));
  },
  flow: (T) => [range(T).map((t) => 1 - (t + 1) / (T + 1)), range(T).map((t) => (t + 1) / (T + 1))],
};

// ------------------------------------------------------------------------------------------------- the forward process

export class Diffusion {
  constructor({ schedule, prediction, timesteps }) {
    const [alpha, sigma] = SCHEDULES[schedule](timesteps);
    // The last entry, .at(-1), is the clean image.
    [this.T, this.alpha, this.sigma, this.prediction] = [timesteps, [...alpha, 1], [...sigma, 0], prediction];
    this.flow = schedule === "flow";
  }

  q_sample(x0, t, eps) {
    return map((x, e) => this.alpha[t] * x + this.sigma[t] * e, x0, eps);
  }

  predict_x0(out, x_t, t) {
    const [alpha, sigma] = [this.alpha[t], this.sigma[t]];
    const [d_alpha, d_sigma] = this.flow ? [-1, 1] : [-sigma, alpha];
    const divisor = alpha * d_sigma - sigma * d_alpha;
    const [x_factor, out_factor] = {
      eps: [1 / alpha, -sigma / alpha],
      x0: [0, 1],
      v: [d_sigma / divisor, -sigma / divisor],
    }[this.prediction];
    return map((x, o) => x_factor * x + out_factor * o, x_t, out);
  }
}

// ---------------------------------------------------------------------------------------------------------- prediction

// predict(x_t, t) for labels y, with classifier-free guidance; outside of the interval [low, high], the scale is 1.
export function guide(model, y, null_class, scale = 1, interval = null) {
  const [low, high] = interval ?? [0, Infinity];
  return async (x_t, t) => {
    if (scale === 1 || t < low || t > high) return model(x_t, t, y);
    const x = new Float32Array(2 * x_t.length);
    x.set(x_t);
    x.set(x_t, x_t.length);
    const both = await model(x, t, [...y, ...y.map(() => null_class)]);
    const [conditional, unconditional] = [both.subarray(0, x_t.length), both.subarray(x_t.length)];
    return map((c, u) => u + scale * (c - u), conditional, unconditional);
  };
}

// ------------------------------------------------------------------------------------------------------------ samplers
// constrain(x0_hat) returns the x0_hat to use.

const pairwise = (timesteps) => timesteps.map((t, i) => [t, timesteps[i + 1] ?? -1]);

export const spaced_timesteps = (T, steps) =>
  range(steps).map((i) => (steps === 1 ? T - 1 : round(((T - 1) * (steps - 1 - i)) / (steps - 1))));

export const shortcut_timesteps = (T, steps) => range(steps).map((i) => round((T * (steps - i)) / steps) - 1);

// The timesteps of SDEdit (arXiv 2108.01073), which begins with an image with the noise of timestep strength (T - 1), as
// TrainedModel.timesteps in sampling.py: fewer than `steps` in proportion to the strength, 0 to 1.
export function edit_timesteps(T, strength, steps) {
  const t = round(strength * (T - 1));
  return spaced_timesteps(t + 1, clamp(round(strength * steps), 1, t + 1));
}

export function ddim_step(diffusion, x_t, x0_hat, t, s) {
  const { alpha, sigma } = diffusion;
  return map((x, x0) => alpha.at(s) * x0 + (sigma.at(s) * (x - alpha[t] * x0)) / sigma[t], x_t, x0_hat);
}

export async function* ddim(diffusion, predict, x, timesteps, constrain = clip) {
  for (const [t, s] of pairwise(timesteps)) {
    const x0_hat = constrain(diffusion.predict_x0(await predict(x, t), x, t));
    yield x0_hat;
    x = ddim_step(diffusion, x, x0_hat, t, s);
  }
}

// Distilled networks also receive the size of the step.
export const shortcut = (diffusion, model, y, x, timesteps, constrain = clip) => {
  const step_size = Object.fromEntries(pairwise(timesteps).map(([t, s]) => [t, t - s]));
  return ddim(diffusion, (x_t, t) => model(x_t, t, y, step_size[t]), x, timesteps, constrain);
};

export async function* dpm_solver(diffusion, predict, x, timesteps, constrain = clip) {
  const { alpha, sigma } = diffusion;
  let previous_x0_hat, previous_h;
  for (const [t, s] of pairwise(timesteps)) {
    const x0_hat = constrain(diffusion.predict_x0(await predict(x, t), x, t));
    yield x0_hat;
    if (s < 0) return;
    const h = Math.log(alpha[s] / sigma[s]) - Math.log(alpha[t] / sigma[t]);
    const slope = previous_h ? h / (2 * previous_h) : 0;
    const extrapolated = map((x0, previous) => x0 + slope * (x0 - previous), x0_hat, previous_x0_hat ?? x0_hat);
    x = map((x_t, x0) => (sigma[s] / sigma[t]) * x_t - alpha[s] * Math.expm1(-h) * x0, x, extrapolated);
    [previous_x0_hat, previous_h] = [x0_hat, h];
  }
}

// --------------------------------------------------------------------------------------------------------------- noise

// n images of Gaussian noise. The same seed gives the same noise.
export function image_noise(seed, n = 1) {
  let state = Math.imul(seed + 1, 0x9e3779b1); // far apart for neighbouring seeds, and not 0
  const uniform = () => {
    state ^= state << 13; // a xorshift generator (Marsaglia, 2003)
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
  for (const _ of range(16)) uniform(); // the first numbers still resemble the seed
  // Box and Muller: two uniform numbers become a length and an angle, and so a normal number.
  return Float32Array.from({ length: n * PIXELS }, () =>
    Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
}

// Noise that is `fraction` of the way from a to b, along an arc.
export function slerp(a, b, fraction) {
  const dot = (p, q) => p.reduce((sum, v, i) => sum + v * q[i], 0);
  const angle = Math.acos(dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b)));
  const [p, q] = [Math.sin((1 - fraction) * angle) / Math.sin(angle), Math.sin(fraction * angle) / Math.sin(angle)];
  return map((v, w) => p * v + q * w, a, b);
}
