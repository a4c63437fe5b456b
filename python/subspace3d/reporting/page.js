"use strict";

// Light or dark: what the system asks for until the reader chooses. This runs in the head, before anything is painted.
const THEME_KEY = "subspace3d-theme";
// a page opened from disk may have no storage
const storage = (work) => { try { return work(localStorage); } catch { return null; } };
{
  const remembered = storage((store) => store.getItem(THEME_KEY));
  if (remembered === "light" || remembered === "dark") document.documentElement.dataset.theme = remembered;
}

function startThemeSwitch() {
  const button = document.querySelector("[data-theme-switch]"), root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const other = () => ((root.dataset.theme || (system.matches ? "dark" : "light")) === "dark" ? "light" : "dark");
  const show = () => {
    button.textContent = other() === "dark" ? "Dark" : "Light";
    button.setAttribute("aria-label", `switch to ${other()} colours`);
    document.dispatchEvent(new Event("themechange"));
  };
  button.addEventListener("click", () => {
    root.dataset.theme = other();
    storage((store) => store.setItem(THEME_KEY, root.dataset.theme));
    show();
  });
  system.addEventListener("change", show);
  button.hidden = false;
  show();
}

// Names the section that is being read in the navigation.
function startNavigation() {
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const mark = () => {
    let read = null;
    for (const section of document.querySelectorAll("main > section")) {
      if (section.getBoundingClientRect().top < window.innerHeight / 3) read = section.id;
    }
    links.forEach((link, id) => {
      if (id === read) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    });
  };
  document.addEventListener("scroll", mark, { passive: true });
  mark();
}

document.addEventListener("DOMContentLoaded", () => {
  startThemeSwitch();
  startNavigation();
});
