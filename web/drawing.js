// Images on canvases, and strokes that become images.

const SIZE = 28;

// Image number i of (B, 28, 28), in [-1, 1]. color(v, x, y) -> [r, g, b] may colour it; else it is grey.
export function paint(canvas, images, i = 0, color = (v) => [v, v, v]) {
  [canvas.width, canvas.height] = [SIZE, SIZE];
  const context = canvas.getContext("2d");
  const picture = context.createImageData(SIZE, SIZE);
  for (let p = 0; p < SIZE * SIZE; p++) {
    const grey = Math.round(Math.min(1, Math.max(-1, images[i * SIZE * SIZE + p])) * 127.5 + 127.5);
    picture.data.set([...color(grey, p % SIZE, Math.floor(p / SIZE)), 255], 4 * p);
  }
  context.putImageData(picture, 0, 0);
}

// Strokes are lists of points [x, y] in 0 ... 1, and in the address two letters a point, with a dot between strokes.
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const MOST_LETTERS = 1500;

export const encode = (strokes) =>
  strokes.map((stroke) => stroke.flat().map((v) => LETTERS[Math.round(Math.min(1, Math.max(0, v)) * 63)]).join(""))
    .join(".").slice(0, MOST_LETTERS);

export const decode = (text) =>
  text.slice(0, MOST_LETTERS).split(".").map((word) =>
    (word.match(/[\w-]{2}/g) ?? []).map((pair) => [...pair].map((letter) => LETTERS.indexOf(letter) / 63)))
    .filter((stroke) => stroke.length);

// The distance in pixels of each pixel's centre to the strokes.
function distances(strokes) {
  return Float32Array.from({ length: SIZE * SIZE }, (_, p) => {
    const [x, y] = [(p % SIZE) + 0.5, Math.floor(p / SIZE) + 0.5];
    let nearest = Infinity;
    for (const stroke of strokes) {
      stroke.forEach(([bx, by], i) => {
        const [ax, ay] = stroke[Math.max(0, i - 1)];
        const [dx, dy] = [(bx - ax) * SIZE, (by - ay) * SIZE];
        const [px, py] = [x - ax * SIZE, y - ay * SIZE];
        const h = Math.min(1, Math.max(0, (px * dx + py * dy) / (dx * dx + dy * dy || 1)));
        nearest = Math.min(nearest, Math.hypot(px - h * dx, py - h * dy));
      });
    }
    return nearest;
  });
}

// Strokes as an image with soft edges, like those of MNIST, and a mask that is true where they are white.
export function brush(strokes) {
  const distance = distances(strokes);
  const image = distance.map((d) => 2 * Math.min(1, Math.max(0, 1 - (d - 0.9) / 1.2)) - 1);
  return { image, mask: Array.from(distance, (d) => d < 1.2) };
}

// Strokes of the size and at the place that digits have in MNIST: 20 pixels high or wide, the centre of mass in the
// middle.
export function normalized(strokes) {
  const [xs, ys] = [0, 1].map((axis) => strokes.flat().map((point) => point[axis]));
  const middle = (values) => (Math.min(...values) + Math.max(...values)) / 2;
  const extent = (values) => Math.max(...values) - Math.min(...values);
  const scale = Math.min(3, 17 / SIZE / Math.max(extent(xs), extent(ys), 0.01)); // the brush adds 3 pixels
  const moved = (dx, dy) => strokes.map((stroke) =>
    stroke.map(([x, y]) => [(x - middle(xs)) * scale + 0.5 + dx, (y - middle(ys)) * scale + 0.5 + dy]));
  const { image } = brush(moved(0, 0));
  const mass = image.reduce((sum, v) => sum + v + 1, 0);
  const centre = (coordinate) => image.reduce((sum, v, p) => sum + (v + 1) * (coordinate(p) + 0.5), 0) / mass / SIZE;
  return moved(0.5 - centre((p) => p % SIZE), 0.5 - centre((p) => Math.floor(p / SIZE)));
}
