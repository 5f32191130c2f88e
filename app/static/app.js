"use strict";

const PAGE_SIZE = 10;
// Often enough to watch a deploy go by.
const INSTANCE_SECONDS = 2;

const byId = (id) => document.getElementById(id);
const list = byId("posts");
const more = byId("more");
let nextCursor = null;

/** Call the API; resolves to the body, and rejects with a message that can be shown. */
async function api(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { headers: { "Content-Type": "application/json" }, ...options });
  } catch {
    throw new Error("The service cannot be reached.");
  }
  if (response.status === 204) return null;
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const reasons = (body.errors ?? []).map((error) => `${error.where}: ${error.message}`);
  throw new Error(reasons.join("; ") || body.detail || `The service answered ${response.status}.`);
}

function say(text, failed = false) {
  const message = byId("message");
  message.textContent = text;
  message.classList.toggle("failed", failed);
}

/** Run what a person has asked for with its button disabled, and say what went wrong. */
async function attempt(button, action) {
  button.disabled = true;
  try {
    await action();
  } catch (error) {
    say(error.message, true);
  } finally {
    button.disabled = false;
  }
}

/** Make the list item of a post. textContent throughout: nothing that somebody wrote becomes markup. */
function render(post) {
  const item = byId("post").content.cloneNode(true).firstElementChild;
  item.querySelector("h3").textContent = post.title;
  item.querySelector(".text").textContent = post.body;
  const time = item.querySelector("time");
  time.dateTime = post.created_at;
  time.textContent = new Date(post.created_at).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  const button = item.querySelector("button");
  button.setAttribute("aria-label", `Delete “${post.title}”`);
  button.addEventListener("click", () =>
    attempt(button, async () => {
      await api(`/api/posts/${post.id}`, { method: "DELETE" });
      item.remove();
      showEmpty();
      say("Deleted.");
      byId("posts-title").focus();
    }),
  );
  return item;
}

function showEmpty() {
  byId("empty").hidden = list.childElementCount > 0 || nextCursor !== null;
}

async function loadPage() {
  const query = new URLSearchParams({ limit: PAGE_SIZE });
  if (nextCursor) query.set("cursor", nextCursor);
  const page = await api(`/api/posts?${query}`);
  list.append(...page.items.map(render));
  nextCursor = page.next_cursor;
  more.hidden = nextCursor === null;
  showEmpty();
}

async function showInstance() {
  const shown = byId("instance");
  const instance = await api("/api/info");
  let changed = false;
  for (const cell of shown.querySelectorAll("[data-instance]")) {
    const value = instance[cell.dataset.instance];
    changed ||= cell.textContent !== value && cell.textContent !== "…";
    cell.textContent = value;
    if (cell.dataset.instance === "slot") cell.dataset.slot = value;
  }
  if (changed) {
    shown.classList.remove("changed");
    requestAnimationFrame(() => shown.classList.add("changed"));
  }
}

byId("write").addEventListener("submit", (event) => {
  event.preventDefault();
  const form = event.currentTarget;
  attempt(form.querySelector("button"), async () => {
    const data = Object.fromEntries(new FormData(form));
    const post = await api("/api/posts", { method: "POST", body: JSON.stringify(data) });
    list.prepend(render(post));
    showEmpty();
    form.reset();
    say("Published.");
    byId("title").focus();
  });
});

more.addEventListener("click", () => attempt(more, loadPage));

loadPage().catch((error) => say(error.message, true));
showInstance().catch(() => {});
setInterval(() => {
  if (!document.hidden) showInstance().catch(() => {});
}, INSTANCE_SECONDS * 1000);
