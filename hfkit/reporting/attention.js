// Shows where each token looks. Weights come as bytes: 255 times the square root, the lower triangle of each head.
const data = document.getElementById("weights");
const layers = data.dataset.layers.split(" "), heads = Number(data.dataset.heads);
const tokens = [...document.querySelectorAll("#text span")], length = tokens.length;
const bytes = Uint8Array.from(atob(data.value), (character) => character.charCodeAt(0));
const size = (length * (length + 1)) / 2;
let layer = 0, head = 0, row = length - 1;

function root(row, column, of = [layer, head]) {
  return column > row ? 0 : bytes[(of[0] * heads + of[1]) * size + (row * (row + 1)) / 2 + column] / 255;
}

// Relative to the strongest of its row: in a long text all weights are small.
function shades(row, of = [layer, head]) {
  const roots = Array.from({length: row + 1}, (_, column) => root(row, column, of)), most = Math.max(...roots) || 1;
  return roots.map((value) => value / most);
}

function percent(row, column) {
  const weight = 100 * root(row, column) ** 2;
  return weight >= 1 || weight === 0 ? `${weight.toFixed(0)} %` : "< 1 %";
}

function draw(canvas, of) {
  canvas.width = canvas.height = length;
  const context = canvas.getContext("2d"), image = context.createImageData(length, length);
  for (let i = 0; i < length; i++) {
    shades(i, of).forEach((shade, j) => image.data.set([58, 140, 210, 255 * shade], 4 * (i * length + j)));
  }
  context.putImageData(image, 0, 0);
}

function showRow(column = -1) {
  const shade = shades(row);
  tokens.forEach((token, j) => {
    token.style.background = `rgba(58, 140, 210, ${shade[j] ?? 0})`;
    token.classList.toggle("from", j === row);
    token.classList.toggle("to", j === column);
  });
  const order = [...Array(row + 1).keys()].sort((a, b) => root(row, b) - root(row, a)).slice(0, 8);
  const chosen = column >= 0 && column <= row ? ` It looks at ${tokens[column].textContent}: ${percent(row, column)}.` : "";
  document.getElementById("who").textContent =
    `Layer ${layers[layer]}, head ${head}: token ${row}, ${tokens[row].textContent}.${chosen}`;
  document.getElementById("where").replaceChildren(...order.map((j) => {
    const item = document.createElement("li");
    item.textContent = `${percent(row, j)}  ${tokens[j].textContent}  (token ${j})`;
    return item;
  }));
}

function showHead(newLayer, newHead) {
  [layer, head] = [newLayer, newHead];
  document.querySelectorAll("#heads button").forEach((button, number) => {
    button.setAttribute("aria-pressed", number === layer * heads + head);
  });
  draw(document.getElementById("map"), [layer, head]);
  showRow();
}

const grid = document.getElementById("heads");
grid.style.gridTemplateColumns = `repeat(${heads}, minmax(2.5rem, 6rem))`;
layers.forEach((name, number) => {
  for (let other = 0; other < heads; other++) {
    const button = document.createElement("button"), canvas = document.createElement("canvas");
    button.append(canvas, `${name}.${other}`);
    button.title = `layer ${name}, head ${other}`;
    button.onclick = () => showHead(number, other);
    grid.append(button);
    draw(canvas, [number, other]);
  }
});
tokens.forEach((token, number) => {
  token.tabIndex = 0;
  for (const event of ["pointerenter", "click", "focus"]) {
    token.addEventListener(event, () => { row = number; showRow(); });
  }
});
document.getElementById("map").addEventListener("pointermove", (event) => {
  const box = event.target.getBoundingClientRect(), scale = length / box.width;
  const place = (offset) => Math.min(length - 1, Math.max(0, Math.floor(offset * scale)));
  row = place(event.clientY - box.top);
  showRow(place(event.clientX - box.left));
});
showHead(0, 0);
