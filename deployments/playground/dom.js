// Small helpers for building elements.

export const $ = (id) => document.getElementById(id);

/** el("p.note", {title: "x", onclick}, child, "text", …) */
export function el(spec, attributes = {}, ...children) {
  const [tag, ...classes] = spec.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Text with fenced and inline code and bold; everything else stays as it was written. */
export function prose(text) {
  const fragment = document.createDocumentFragment();
  text.split(/^```[^\n]*\n([\s\S]*?)(?:^```[ \t]*(?:\n|$)|$(?![\s\S]))/m).forEach((part, index) => {
    if (index % 2) fragment.append(el("pre", { tabindex: 0 }, el("code", {}, part)));
    else {
      for (const [, code, bold, plain] of part.matchAll(/`([^`\n]+)`|\*\*([^*\n]+)\*\*|([\s\S]+?(?=`|\*\*|$(?![\s\S]))|[`*])/g)) {
        if (code) fragment.append(el("code", {}, code));
        else if (bold) fragment.append(el("strong", {}, bold));
        else fragment.append(plain);
      }
    }
  });
  return fragment;
}

/** Copies, and says so on the button for a moment. */
export async function copy(button, text) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no permission, or a page that is not served over https
    const area = el("textarea", {}, text);
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
  }
  const label = button.textContent;
  button.textContent = done ? "Copied" : "Failed";
  setTimeout(() => (button.textContent = label), 1200);
}

/** Shows the one popover beside an element or a point. */
export function popover(content, { left, bottom, top }) {
  const box = $("popover");
  box.replaceChildren(content);
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
  box.style.top = `${bottom + height + 12 > innerHeight ? top - height - 6 : bottom + 6}px`;
}

export const hidePopover = () => ($("popover").hidden = true);

/** A canvas context in CSS pixels, for the canvas's present size. */
export function context(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/** The value of a colour of the style sheet, as the theme now has it. */
export function colour(name) {
  const probe = $("popover");
  probe.style.setProperty("outline-color", `var(${name})`);
  return getComputedStyle(probe).outlineColor;
}

/** A colour of its own for every request; neighbours in time are far apart in hue. */
function hue(id) {
  let number = Number(id.replace(/\D/g, ""));
  if (!Number.isFinite(number) || number > 1e9) number = [...id].reduce((sum, c) => (sum * 31 + c.charCodeAt(0)) % 9973, 7);
  return 112 + ((number * 137.508) % 360) * (300 / 360); // not the gold of shared blocks
}

const dark = () => matchMedia("(prefers-color-scheme: dark)").matches
  ? document.documentElement.dataset.theme !== "light" : document.documentElement.dataset.theme === "dark";
export const requestColour = (id) => `oklch(${dark() ? 0.74 : 0.62} 0.13 ${hue(id).toFixed(0)})`;
