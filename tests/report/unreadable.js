// What a reader of the page could not make out: text with a contrast below 4.5 to what is behind it (WCAG AA; large text 3), and labels
// of charts that are cut off.
const channels = (colour) => {
  const found = colour.match(/[\d.]+/g).map(Number);
  return found.length < 4 ? [...found, 1] : found;
};
const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));

function behind(element) {
  if (!element) return [255, 255, 255];
  const colour = channels(getComputedStyle(element).backgroundColor);
  return colour[3] === 1 ? colour : over(colour, behind(element.parentElement));
}

function contrast(element) {
  const style = getComputedStyle(element);
  const back = behind(element);
  const front = over(channels(element instanceof SVGElement ? style.fill : style.color), back);
  const [high, low] = [luminance(front), luminance(back)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}

function isLarge(element) {
  const { fontSize, fontWeight } = getComputedStyle(element);
  return parseFloat(fontSize) >= 24 || (parseFloat(fontSize) >= 18.66 && fontWeight >= 700);
}

const found = new Set();
for (const element of document.querySelectorAll("body *:not(script, style, noscript)")) {
  const hasText = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
  if (!hasText || !element.checkVisibility()) continue;
  const value = contrast(element);
  if (value < (isLarge(element) ? 3 : 4.5)) found.add(`${element.tagName} ${element.getAttribute("class")}: contrast ${value.toFixed(2)}`);
}
for (const plot of document.querySelectorAll(".plot")) {
  const frame = plot.getBoundingClientRect();
  for (const label of plot.querySelectorAll("text")) {
    const box = label.getBoundingClientRect();
    const inside = box.left >= frame.left - 1 && box.right <= frame.right + 1 && box.bottom <= frame.bottom + 1;
    if (box.width && !inside) found.add(`cut off: ${label.textContent}`);
  }
}
return [...found];
