// Scripts of the pages: theme, keys, selection, baseline, search in tables, and live updates. The server renders everything;
// live updates fetch the same address again and replace the parts that differ.

import { charts } from './chart.js';
import { pictures } from './pictures.js';

const root = document.documentElement;
const body = document.body;
root.classList.add('js');

const memory = {
  get(name) { try { return localStorage.getItem(`retort.${name}`); } catch { return null; } },
  set(name, value) {
    try { value ? localStorage.setItem(`retort.${name}`, value) : localStorage.removeItem(`retort.${name}`); } catch { /* Not kept, then. */ }
  },
};

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const one = (selector, within = document) => within.querySelector(selector);
const reveal = () => all('[data-needs-script]').forEach((element) => { element.hidden = false; });
reveal();

// Theme

function toggleTheme() {
  const dark = root.dataset.theme ? root.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
  root.dataset.theme = dark ? 'light' : 'dark';
  memory.set('theme', root.dataset.theme);
}
for (const [id, act] of [['theme', toggleTheme], ['keys', () => one('#help').showModal()]]) {
  const button = document.getElementById(id);
  button.hidden = false;
  button.addEventListener('click', act);
}

// The baseline: part of the address, so that links preserve it, and remembered for the next visit.

const place = new URL(location);
const baseline = () => new URL(location).searchParams.get('baseline');

function go(change) {
  const next = new URL(location);
  change(next.searchParams);
  location.assign(next);
}
function pin(run) {
  const pinned = memory.get('baseline') === run || baseline() === run;
  memory.set('baseline', pinned ? null : run);
  if (body.dataset.place === 'Run') return showPin();
  go((fields) => { pinned ? fields.delete('baseline') : fields.set('baseline', run); });
}
function showPin() {
  // What a run is compared with is the baseline, once there is one.
  const kept = memory.get('baseline');
  for (const link of body.dataset.place === 'Run' ? all('a[href^="/compare?"]') : []) {
    const to = new URL(link.href);
    kept && kept !== to.searchParams.get('run') ? to.searchParams.set('baseline', kept) : to.searchParams.delete('baseline');
    link.href = to.pathname + to.search;
  }
  for (const button of all('button[data-pin]')) button.hidden = false;
  const button = one('#pin');
  if (!button) return;
  const pinned = memory.get('baseline') === button.dataset.pin;
  button.setAttribute('aria-pressed', pinned);
  button.textContent = pinned ? 'Baseline (unpin)' : 'Pin as baseline';
}
function takeBaseline() {
  if (body.dataset.place !== 'Runs') return;
  const kept = memory.get('baseline');
  if (baseline()) memory.set('baseline', baseline());
  else if (kept) {
    place.searchParams.set('baseline', kept);
    location.replace(place);
  }
}
document.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-pin]');
  if (button) pin(button.dataset.pin);
});

// Rows: one of them is where the keys act.

let at = null;
const rows = () => all('tr[data-run]');

function stand(run, scroll = true) {
  at = run;
  for (const row of rows()) {
    const here = row.dataset.run === run;
    row.classList.toggle('at', here);
    if (here && scroll) row.scrollIntoView({ block: 'nearest' });
  }
}
function step(by) {
  const list = rows();
  if (!list.length) return;
  const now = list.findIndex((row) => row.dataset.run === at);
  const next = now < 0 ? (by > 0 ? 0 : list.length - 1) : Math.min(list.length - 1, Math.max(0, now + by));
  stand(list[next].dataset.run);
}
const row = () => rows().find((candidate) => candidate.dataset.run === at);

// Selection: kept while the page follows what happens.

const picked = new Set();

function showPicked() {
  for (const box of all('td.pick input[name="run"]')) box.checked = picked.has(box.value);
  for (const bar of all('.picked')) {
    const inside = all('td.pick input:checked', bar.closest('form')).length;
    bar.classList.toggle('some', inside > 0);
    const said = one('span', bar);
    if (said) said.textContent = ` of ${inside} selected run${inside === 1 ? '' : 's'}`;
  }
}
document.addEventListener('change', (event) => {
  const box = event.target.closest('td.pick input[name="run"]');
  if (!box) return;
  box.checked ? picked.add(box.value) : picked.delete(box.value);
  showPicked();
});
addEventListener('pageshow', () => {
  for (const box of all('td.pick input[name="run"]:checked')) picked.add(box.value);
  showPicked();
});

// Search within a table or a list, at once.

function search(field) {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  const target = document.getElementById(field.dataset.searches);
  if (!target) return;
  for (const item of all('tbody > tr, :scope > li', target)) {
    const text = item.textContent.toLowerCase();
    item.hidden = !words.every((word) => text.includes(word));
  }
}
document.addEventListener('input', (event) => {
  if (event.target.matches('[data-searches]')) search(event.target);
});

// Keys

let before = '';
const typing = (element) => element.closest('input:not([type="checkbox"]):not([type="range"]), select, textarea, [contenteditable]');
const keys = {
  j: () => step(1),
  k: () => step(-1),
  o: () => row() && one('td.id a', row()).click(),
  x: () => { const box = row() && one('td.pick input', row()); if (box) box.click(); },
  p: () => { const run = row()?.dataset.run ?? one('#pin')?.dataset.pin; if (run) pin(run); },
  c: () => { const bar = one('.picked.some'); if (bar) one('button', bar).click(); },
  t: toggleTheme,
  '?': () => one('#help').showModal(),
  '/': () => { const field = one('#where, #text, #params-search, aside input[type="search"]'); if (field) { field.focus(); field.select(); } },
};
// Where the links of the page's head lead: they keep the runs and the baseline.
const places = { r: '', c: 'curves', p: 'pictures', v: 'compare' };

document.addEventListener('keydown', (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (typing(event.target)) {
    if (event.key === 'Escape') event.target.blur();
    return;
  }
  if (one('dialog[open]')) return;
  if (before === 'g' && event.key in places) {
    before = '';
    event.preventDefault();
    const links = all('.top nav a');
    location.assign(links.find((link) => new URL(link.href).pathname === `/${places[event.key]}`).href);
    return;
  }
  before = event.key === 'g' ? 'g' : '';
  // After a click on empty space, key presses go to the body or to `main`. Enter then opens the selected row.
  const free = event.target === body || event.target.id === 'main';
  const act = event.key === 'Enter' && free ? keys.o : keys[event.key];
  if (act) {
    event.preventDefault();
    act();
  }
});

// Following what happens

function replace(fresh) {
  document.title = fresh.title;
  for (const old of all('[data-live][id]')) {
    const next = fresh.getElementById(old.id);
    if (!next || old.isEqualNode(next)) continue;
    const within = document.activeElement && old.contains(document.activeElement);
    if (within && typing(document.activeElement)) continue;
    const log = one('.log', old);
    const end = log && log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    const top = log?.scrollTop;
    const open = all('details', old).map((details) => details.open);
    const aside = all('.scroll', old).map((scroll) => scroll.scrollLeft);
    const ticked = new Set(all('input[type="checkbox"]:checked', old).map((box) => `${box.name}=${box.value}`));
    // Curves are drawn into their figures, and follow by themselves.
    const drawn = new Map(all('figure.chart', old).map((figure) => [figure.dataset.series, figure]));
    const imported = document.importNode(next, true);
    for (const figure of all('figure.chart', imported)) {
      const known = drawn.get(figure.dataset.series);
      if (known) figure.replaceWith(known);
    }
    old.replaceWith(imported);
    const lines = one('.log', imported);
    if (lines) lines.scrollTop = end ? lines.scrollHeight : top;
    all('details', imported).forEach((details, number) => { details.open = open[number] ?? details.open; });
    all('.scroll', imported).forEach((scroll, number) => { scroll.scrollLeft = aside[number] ?? 0; });
    for (const box of all('input[type="checkbox"]', imported)) box.checked = ticked.has(`${box.name}=${box.value}`);
  }
  charts.adopt();
  reveal();
  showPin();
  showPicked();
  stand(at, false);
  all('[data-searches]').forEach((field) => { if (field.value) search(field); });
}

function follow() {
  const run = body.dataset.live;
  if (run === undefined) return;
  let busy = false;
  let again = false;
  let last = 0;
  let source = null;
  let ended = false;
  const refresh = async () => {
    if (busy || document.hidden) { again = true; return; }
    busy = true;
    again = false;
    try {
      if (one('[data-live][id]')) {
        const answer = await fetch(location.href, { headers: { accept: 'text/html' } });
        if (answer.ok) {
          const fresh = new DOMParser().parseFromString(await answer.text(), 'text/html');
          replace(fresh);
          // A run that has ended is followed no more.
          if (run && fresh.body.dataset.live === undefined) { ended = true; rest(); }
        }
      }
      await charts.refresh();
    } catch { /* The server may be gone; the stream says so. */ }
    last = Date.now();
    busy = false;
    if (again) setTimeout(refresh, 1000);
  };
  const pulse = (on) => one('#pulse')?.classList.toggle('on', on);
  const rest = () => {
    source?.close();
    source = null;
    pulse(false);
  };
  // A browser allows six connections to a server for all its tabs, so hidden tabs hold none.
  const listen = () => {
    if (source || ended || document.hidden) return;
    source = new EventSource(run ? `/events?run=${encodeURIComponent(run)}` : '/events');
    source.addEventListener('open', () => pulse(true));
    source.addEventListener('error', () => pulse(false));
    source.addEventListener('change', (event) => {
      // `again` comes although nothing was written. It matters only for runs under way: their process may have died.
      if (event.data === 'again' && !one('.pill.now, .meter')) return;
      const wait = Math.max(0, 900 - (Date.now() - last));
      setTimeout(refresh, wait);
    });
  };
  listen();
  document.addEventListener('visibilitychange', () => {
    if (document.hidden) return rest();
    listen();
    // What has happened meanwhile.
    if (!ended) refresh();
  });
  addEventListener('pagehide', rest);
  addEventListener('pageshow', (event) => { if (event.persisted) location.reload(); });
}

takeBaseline();
showPin();
showPicked();
const log = one('.log');
if (log) log.scrollTop = log.scrollHeight;
// On a narrow page the open one of a run's tabs may lie beside it.
const tab = one('.tabs [aria-current]');
if (tab) tab.parentElement.scrollLeft = tab.offsetLeft - (tab.parentElement.clientWidth - tab.offsetWidth) / 2;
charts.start();
pictures.start();
follow();
