// Puts the page together: views, theme, the server's name and health.

import { getJson } from "./api.js";
import * as chat from "./chat.js";
import { $ } from "./dom.js";
import * as engine from "./engine.js";
import * as load from "./load.js";
import * as settings from "./settings.js";

const root = document.documentElement;
let model; // {id, max_model_len}, once known

function show(view) {
  root.dataset.view = view;
  for (const button of document.querySelectorAll("[data-show]")) {
    button.setAttribute("aria-pressed", button.dataset.show === view);
  }
  history.replaceState(null, "", `${location.pathname}${location.search}#${view}`);
  engine.setVisible(getComputedStyle($("engine")).display !== "none");
}

function showSettings(open) {
  $("settings").hidden = !open;
  root.dataset.settings = open ? "open" : "closed";
  $("toggle-settings").setAttribute("aria-expanded", open);
  if (open) $("system").focus();
}

const THEMES = { auto: "◐", light: "☀", dark: "☾" };

function setTheme(name) {
  root.dataset.theme = name;
  localStorage.setItem("manta-theme", name);
  $("theme").textContent = THEMES[name];
  $("theme").setAttribute("aria-label", `Colour theme: ${name === "auto" ? "as the system" : name}`);
  document.dispatchEvent(new Event("manta:theme"));
}

async function refresh() {
  const state = (name, title) => {
    $("health").dataset.state = name;
    $("health").title = title;
  };
  try {
    if (!model) {
      [model] = (await getJson("v1/models")).data;
      const window = model.max_model_len ? ` · ${model.max_model_len.toLocaleString()} tokens` : "";
      $("model").textContent = `${model.id}${window}`;
      document.title = `${model.id} · Manta`;
    }
    $("key").placeholder = "None needed";
    await getJson("health");
    state("ok", "The engine is serving");
  } catch (error) {
    state("bad", error.message);
    if (!model) $("model").textContent = error.status === 401 ? "an API key is needed" : "not reachable";
    if (error.status === 401) $("key").placeholder = "This server asks for one";
    if (error.status === 401 && $("settings").hidden && !refresh.asked) {
      refresh.asked = true;
      showSettings(true);
      $("key").focus();
    }
  }
}

for (const button of document.querySelectorAll("[data-show]")) button.addEventListener("click", () => show(button.dataset.show));
$("toggle-settings").addEventListener("click", () => showSettings($("settings").hidden));
$("close-settings").addEventListener("click", () => {
  showSettings(false);
  $("toggle-settings").focus();
});
$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(root.dataset.theme) + 1) % names.length]);
});
document.addEventListener("keydown", (event) => event.key === "Escape" && !$("settings").hidden && showSettings(false));
document.addEventListener("manta:key", () => {
  model = undefined;
  refresh();
  settings.learn();
  engine.reconnect();
});
document.addEventListener("visibilitychange", () => show(root.dataset.view));
matchMedia("(max-width: 720px)").addEventListener("change", () => show(root.dataset.view));

setTheme(localStorage.getItem("manta-theme") ?? "auto");
settings.start();
chat.start(() => model?.id);
engine.start();
load.start(() => model);
const wanted = location.hash.slice(1);
show(["chat", "both", "engine"].includes(wanted) ? wanted : innerWidth >= 1200 ? "both" : "chat");
refresh();
setInterval(() => document.hidden || refresh(), 5000);
if (matchMedia("(pointer: fine)").matches) $("input").focus();
