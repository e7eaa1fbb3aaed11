// Curves: each figure requests as many buckets as it has room for, and finer ones when zoomed in. The mean of a bucket is the
// line, its least and greatest value the band. Drawn as SVG, so that it can be saved as seen.

const NS = 'http://www.w3.org/2000/svg';
const SIZE = { width: 640, height: 230, left: 58, right: 12, top: 10, bottom: 26 };
const COLUMNS = { x: 0, min: 1, mean: 2, max: 3, first: 4, last: 5, points: 6 };

const element = (name, attributes = {}, parent = null) => {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent?.append(made);
  return made;
};

// Six digits, as the tables have it.
export function brief(value) {
  if (value === null || Number.isNaN(value)) return '–';
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e9)) return value.toExponential(3);
  if (Number.isInteger(value)) return String(value);
  return String(Number(value.toPrecision(6)));
}
const seconds = (value) => {
  if (value < 60) return `${brief(Math.round(value * 10) / 10)} s`;
  if (value < 3600) return `${Math.floor(value / 60)}m ${String(Math.round(value % 60)).padStart(2, '0')}s`;
  return `${Math.floor(value / 3600)}h ${String(Math.round(value / 60 % 60)).padStart(2, '0')}m`;
};

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  if (!(step > 0) || !Number.isFinite(step)) return [low];
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9 && found.length < 30; tick += step) {
    found.push(Math.abs(tick) < step * 1e-9 ? 0 : tick);
  }
  return found;
}
// Logarithms of round numbers: powers of ten, or what lies between them.
function logTicks(low, high) {
  const inside = (tick) => tick >= low - 1e-9 && tick <= high + 1e-9;
  const of = (factors, every) => {
    const found = [];
    for (let power = Math.floor(low); power <= high; power += every) found.push(...factors.map((factor) => power + Math.log10(factor)));
    return found.filter(inside);
  };
  const powers = of([1], Math.max(1, Math.ceil((high - low) / 6)));
  if (powers.length > 2) return powers;
  const between = of([1, 2, 5], 1);
  return between.length > 2 ? between : ticks(10 ** low, 10 ** high, 5).map(Math.log10).filter(inside);
}

// An exponential average that counts a bucket as often as it has points, without a bias at its beginning.
function smoothed(points, weight) {
  if (!(weight > 0)) return null;
  let sum = 0;
  let total = 0;
  return points.map((point) => {
    const value = point[COLUMNS.mean];
    if (value === null) return null;
    const keep = weight;
    sum = keep * sum + (1 - keep) * value;
    total = keep * total + (1 - keep);
    return sum / total;
  });
}

const figures = [];
const knobs = { axis: 'step', logy: false, logx: false, band: true, smooth: 0, from: null, to: null };
let own = false;
let watch = null;

class Figure {
  constructor(host) {
    this.host = host;
    this.plot = host.querySelector('.plot');
    this.curves = null;
    this.seen = false;
    this.plot.tabIndex = 0;
    this.plot.setAttribute('role', 'group');
    this.plot.setAttribute('aria-label', `Curves of ${host.dataset.series}. Left and right arrow keys read values.`);
    this.tip = document.createElement('div');
    this.tip.className = 'tip';
    this.tip.hidden = true;
    this.tip.setAttribute('role', 'status');
    this.say('loading…', 'waits');
    this.listen();
  }

  say(text, kind) {
    this.plot.replaceChildren();
    const said = document.createElement('span');
    said.className = kind;
    said.textContent = text;
    this.plot.append(said, this.tip);
  }

  address(path) {
    const url = new URL(path ?? this.host.dataset.chart, location);
    for (const name of ['axis', 'from', 'to']) {
      const value = own ? knobs[name] : null;
      if (value !== null && value !== undefined && value !== '') url.searchParams.set(name, value);
      else url.searchParams.delete(name);
    }
    return url;
  }

  async load() {
    this.seen = true;
    const url = this.address();
    url.searchParams.set('buckets', Math.round(Math.max(200, this.plot.clientWidth * 1.2)));
    const turn = this.turn = (this.turn ?? 0) + 1;
    try {
      const answer = await fetch(url);
      if (!answer.ok) throw new Error(String(answer.status));
      const data = await answer.json();
      if (turn !== this.turn) return;
      this.curves = data.curves;
      this.draw();
    } catch {
      if (turn === this.turn && !this.curves) this.say('could not be loaded', 'none');
    }
  }

  // The saved picture is the visible one.
  links() {
    for (const link of this.host.querySelectorAll('[data-save]')) {
      const saved = this.address(link.getAttribute('href'));
      if (link.dataset.save === 'svg') {
        const set = (name, value) => (own && value ? saved.searchParams.set(name, value) : saved.searchParams.delete(name));
        for (const name of ['logy', 'logx']) set(name, knobs[name] && '1');
        set('band', knobs.band ? '' : '0');
        set('smooth', knobs.smooth);
      }
      link.href = saved.pathname + saved.search;
    }
  }

  // Places on the picture.
  scales() {
    const { left, right, top, bottom, height } = SIZE;
    const width = this.width = Math.max(240, this.plot.clientWidth);
    const logx = own && knobs.logx;
    const logy = own && knobs.logy;
    const fx = (value) => (logx ? Math.log10(value) : value);
    const fy = (value) => (logy ? Math.log10(value) : value);
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const curve of this.curves) {
      const smooth = smoothed(curve.points, own ? knobs.smooth : 0);
      curve.smooth = smooth;
      for (const point of curve.points) {
        const x = fx(point[COLUMNS.x]);
        if (!Number.isFinite(x)) continue;
        x0 = Math.min(x0, x);
        x1 = Math.max(x1, x);
        for (const value of own && !knobs.band ? [point[COLUMNS.mean]] : [point[COLUMNS.min], point[COLUMNS.max]]) {
          const y = value === null ? NaN : fy(value);
          if (Number.isFinite(y)) { y0 = Math.min(y0, y); y1 = Math.max(y1, y); }
        }
      }
    }
    if (!(y1 >= y0) || !(x1 >= x0)) return null;
    if (x1 === x0) { x0 -= 0.5; x1 += 0.5; }
    if (y1 === y0) { const more = Math.max(Math.abs(y0) * 0.1, 0.5); y0 -= more; y1 += more; }
    const px = (value) => left + (fx(value) - x0) / (x1 - x0) * (width - left - right);
    const py = (value) => height - bottom - (fy(value) - y0) / (y1 - y0) * (height - top - bottom);
    const ux = (pixel) => x0 + (pixel - left) / (width - left - right) * (x1 - x0);
    return { px, py, ux: (pixel) => (logx ? 10 ** ux(pixel) : ux(pixel)), x0, x1, y0, y1, logx, logy, width };
  }

  draw() {
    this.links();
    const scale = this.scale = this.scales();
    if (!scale) return this.say(this.curves.length ? 'no value here is finite' : 'no points', 'none');
    const { px, py, width } = scale;
    const { height, left, right, top, bottom } = SIZE;
    const svg = element('svg', { viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': this.spoken() });
    const yTicks = scale.logy ? logTicks(scale.y0, scale.y1) : ticks(scale.y0, scale.y1, 5);
    for (const tick of yTicks) {
      const value = scale.logy ? 10 ** tick : tick;
      const y = py(value);
      element('path', { class: 'grid', d: `M${left} ${y}H${width - right}` }, svg);
      const text = element('text', { x: left - 6, y: y + 4, 'text-anchor': 'end' }, svg);
      text.textContent = brief(Number(value.toPrecision(4)));
    }
    const xTicks = scale.logx ? logTicks(scale.x0, scale.x1) : ticks(scale.x0, scale.x1, Math.max(2, Math.floor(width / 80)));
    for (const tick of xTicks) {
      const value = scale.logx ? 10 ** tick : tick;
      const edge = px(value) > width - right - 16;
      const text = element('text', { x: edge ? width - right : px(value), y: height - 8, 'text-anchor': edge ? 'end' : 'middle' }, svg);
      text.textContent = this.axis() === 'time' ? seconds(value) : brief(Number(value.toPrecision(4)));
    }
    const runs = [...new Set(this.curves.map((curve) => curve.run))];
    for (const [number, curve] of this.curves.entries()) {
      curve.color = (runs.length > 1 ? runs.indexOf(curve.run) : number) % 8;
      const group = element('g', { class: `c${curve.color}` }, svg);
      const bands = !own || knobs.band;
      for (const piece of this.pieces(curve, (point) => [point[COLUMNS.min], point[COLUMNS.max]])) {
        if (!bands || piece.length < 2) continue;
        const there = piece.map((point) => `${px(point[COLUMNS.x]).toFixed(1)} ${py(point[COLUMNS.max]).toFixed(1)}`);
        const back = piece.toReversed().map((point) => `${px(point[COLUMNS.x]).toFixed(1)} ${py(point[COLUMNS.min]).toFixed(1)}`);
        element('path', { class: 'band', d: `M${[...there, ...back].join('L')}Z` }, group);
      }
      this.line(curve, (index) => curve.points[index][COLUMNS.mean], curve.smooth ? 'raw' : 'line', group);
      if (curve.smooth) this.line(curve, (index) => curve.smooth[index], 'line', group);
    }
    this.cross = element('g', {}, svg);
    this.plot.replaceChildren(svg, this.tip);
  }

  pieces(curve, of) {
    const { px, py } = this.scale;
    const pieces = [[]];
    for (const point of curve.points) {
      const whole = Number.isFinite(px(point[COLUMNS.x])) && of(point).every((value) => value !== null && Number.isFinite(py(value)));
      whole ? pieces.at(-1).push(point) : pieces.push([]);
    }
    return pieces.filter((piece) => piece.length);
  }

  line(curve, value, kind, group) {
    const { px, py } = this.scale;
    let path = '';
    let begun = false;
    let alone = null;
    const single = () => { if (alone) element('circle', { class: 'point', cx: alone[0], cy: alone[1], r: 2 }, group); alone = null; };
    curve.points.forEach((point, index) => {
      const [x, y] = [px(point[COLUMNS.x]), value(index) === null ? NaN : py(value(index))];
      if (!Number.isFinite(x) || !Number.isFinite(y)) { single(); begun = false; return; }
      path += `${begun ? 'L' : 'M'}${x.toFixed(1)} ${y.toFixed(1)}`;
      alone = begun ? null : [x, y];
      begun = true;
    });
    single();
    element('path', { class: kind, d: path || 'M0 0' }, group);
  }

  axis() { return own ? knobs.axis : 'step'; }

  spoken() {
    return this.curves.map((curve) => {
      const last = curve.points.at(-1);
      return `${curve.stage}/${curve.series} of run ${curve.run}, ending at ${brief(last[COLUMNS.mean])} at step ${last[COLUMNS.last]}`;
    }).join('; ') || 'no points';
  }

  // The values nearest to a place.
  show(x) {
    if (!this.scale || !this.cross) return;
    this.at = x;
    const { px, py, width } = this.scale;
    const rows = [];
    this.cross.replaceChildren();
    for (const curve of this.curves) {
      let nearest = null;
      for (const [index, point] of curve.points.entries()) {
        if (nearest === null || Math.abs(px(point[COLUMNS.x]) - x) < Math.abs(px(curve.points[nearest][COLUMNS.x]) - x)) nearest = index;
      }
      if (nearest === null) continue;
      const point = curve.points[nearest];
      const value = curve.smooth ? curve.smooth[nearest] : point[COLUMNS.mean];
      rows.push({ curve, point, value, x: px(point[COLUMNS.x]), y: value === null ? NaN : py(value) });
    }
    if (!rows.length) return this.hide();
    const nearest = rows.toSorted((a, b) => Math.abs(a.x - x) - Math.abs(b.x - x))[0];
    element('path', { class: 'cross', d: `M${nearest.x} ${SIZE.top}V${SIZE.height - SIZE.bottom}` }, this.cross);
    this.tip.replaceChildren();
    const head = document.createElement('div');
    head.className = 'dim';
    const { point } = nearest;
    const steps = point[COLUMNS.first] === point[COLUMNS.last] ? `step ${point[COLUMNS.first]}` : `steps ${point[COLUMNS.first]}–${point[COLUMNS.last]}`;
    head.textContent = this.axis() === 'time' ? `${seconds(point[COLUMNS.x])} · ${steps}` : steps;
    this.tip.append(head);
    for (const row of rows.slice(0, 12)) {
      if (Number.isFinite(row.y)) element('circle', { class: `point c${row.curve.color}`, cx: row.x, cy: row.y, r: 3.2 }, this.cross);
      const line = document.createElement('div');
      const swatch = document.createElement('span');
      swatch.className = `swatch c${row.curve.color}`;
      const name = document.createElement('span');
      name.textContent = new Set(this.curves.map((curve) => curve.run)).size > 1 ? row.curve.run : `${row.curve.stage}/${row.curve.series}`;
      const value = document.createElement('span');
      value.className = 'num';
      value.textContent = brief(row.value);
      line.append(swatch, name, value);
      this.tip.append(line);
    }
    this.tip.hidden = false;
    const side = nearest.x > width / 2;
    this.tip.style.left = side ? '' : `${nearest.x + 14}px`;
    this.tip.style.right = side ? `${this.plot.clientWidth - nearest.x + 14}px` : '';
  }

  hide() {
    this.tip.hidden = true;
    this.cross?.replaceChildren();
  }

  listen() {
    let from = null;
    const place = (event) => event.clientX - this.plot.getBoundingClientRect().left;
    this.plot.addEventListener('pointermove', (event) => {
      const x = place(event);
      if (from !== null) {
        this.cross?.replaceChildren();
        element('rect', { class: 'chosen', x: Math.min(from, x), y: SIZE.top, width: Math.abs(x - from), height: SIZE.height - SIZE.top - SIZE.bottom }, this.cross);
        return;
      }
      this.show(x);
    });
    this.plot.addEventListener('pointerleave', () => { if (from === null) this.hide(); });
    this.plot.addEventListener('pointerdown', (event) => {
      if (event.button !== 0 || !own) return;
      from = place(event);
      this.plot.setPointerCapture(event.pointerId);
    });
    this.plot.addEventListener('pointerup', (event) => {
      if (from === null) return;
      const [a, b] = [from, place(event)].sort((one, other) => one - other);
      from = null;
      this.hide();
      b - a > 6 ? this.zoom(a, b) : this.show(b);
    });
    this.plot.addEventListener('pointercancel', () => { from = null; this.hide(); });
    this.plot.addEventListener('dblclick', () => own && charts.range(null, null));
    this.plot.addEventListener('keydown', (event) => {
      const by = { ArrowLeft: -8, ArrowRight: 8 }[event.key];
      if (by && this.scale) { event.preventDefault(); this.show(Math.min(this.scale.width - SIZE.right, Math.max(SIZE.left, (this.at ?? SIZE.left) + by))); }
      if (event.key === 'Escape') { this.hide(); if (own) charts.range(null, null); }
    });
  }

  // The steps between two places: time is zoomed by the steps that were made in it.
  zoom(a, b) {
    const { ux, px } = this.scale;
    if (knobs.axis === 'step') return charts.range(Math.max(0, Math.floor(ux(a))), Math.max(0, Math.ceil(ux(b))));
    const inside = this.curves.flatMap((curve) => curve.points).filter((point) => px(point[COLUMNS.x]) >= a && px(point[COLUMNS.x]) <= b);
    if (!inside.length) return;
    charts.range(Math.min(...inside.map((point) => point[COLUMNS.first])), Math.max(...inside.map((point) => point[COLUMNS.last])));
  }
}

// Knobs are in the address; zooming is a step in the history, so that going back undoes it.

function read() {
  const fields = new URL(location).searchParams;
  knobs.axis = fields.get('axis') === 'time' ? 'time' : 'step';
  knobs.logy = fields.has('logy');
  knobs.logx = fields.has('logx');
  knobs.band = fields.get('band') !== '0';
  knobs.smooth = Math.min(0.99, Math.max(0, Number(fields.get('smooth')) || 0));
  knobs.from = fields.get('from');
  knobs.to = fields.get('to');
}
function write(push) {
  const url = new URL(location);
  const set = (name, value) => (value ? url.searchParams.set(name, value) : url.searchParams.delete(name));
  set('axis', knobs.axis === 'time' ? 'time' : '');
  set('logy', knobs.logy ? '1' : '');
  set('logx', knobs.logx ? '1' : '');
  set('band', knobs.band ? '' : '0');
  set('smooth', knobs.smooth ? String(knobs.smooth) : '');
  set('from', knobs.from);
  set('to', knobs.to);
  push ? history.pushState(null, '', url) : history.replaceState(null, '', url);
}
function showKnobs() {
  for (const knob of document.querySelectorAll('[data-knob]')) {
    const name = knob.dataset.knob;
    if (name === 'axis') knob.setAttribute('aria-pressed', knobs.axis === knob.dataset.value);
    else if (name === 'reset') knob.hidden = knobs.from === null && knobs.to === null;
    else if (name === 'smooth') { knob.value = knobs.smooth; knob.parentElement.querySelector('output').textContent = knobs.smooth; }
    else knob.checked = knobs[name];
  }
}

export const charts = {
  start() {
    const bar = document.querySelector('#knobs');
    own = Boolean(bar);
    if (bar) {
      bar.hidden = false;
      read();
      showKnobs();
      bar.addEventListener('click', (event) => {
        const knob = event.target.closest('button[data-knob]');
        if (!knob) return;
        if (knob.dataset.knob === 'reset') return charts.range(null, null);
        knobs.axis = knob.dataset.value;
        write(true);
        showKnobs();
        charts.load();
      });
      bar.addEventListener('input', (event) => {
        const name = event.target.dataset.knob;
        knobs[name] = name === 'smooth' ? Number(event.target.value) : event.target.checked;
        write(false);
        showKnobs();
        charts.draw();
      });
      // Other runs and series are looked at in the same way; the zoom was into these.
      document.querySelector('#choice').addEventListener('formdata', (event) => {
        const now = new URL(location).searchParams;
        for (const name of ['axis', 'logy', 'logx', 'band', 'smooth']) {
          event.formData.delete(name);
          if (now.has(name)) event.formData.set(name, now.get(name));
        }
      });
      addEventListener('popstate', () => { read(); showKnobs(); charts.load(); });
    }
    // Hidden figures are not requested.
    watch = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const figure = figures.find((candidate) => candidate.host === entry.target);
        if (entry.isIntersecting && figure && !figure.seen) figure.load();
      }
    }, { rootMargin: '300px' });
    charts.adopt();
    let wait;
    addEventListener('resize', () => { clearTimeout(wait); wait = setTimeout(() => charts.draw(), 120); });
  },
  // Figures that have come since.
  adopt() {
    for (const host of document.querySelectorAll('figure.chart')) {
      if (figures.some((figure) => figure.host === host)) continue;
      figures.push(new Figure(host));
      watch.observe(host);
    }
  },
  range(from, to) {
    if (knobs.from === from && knobs.to === to) return;
    knobs.from = from === null ? null : String(from);
    knobs.to = to === null ? null : String(to);
    write(true);
    showKnobs();
    charts.load();
  },
  draw() { for (const figure of figures) if (figure.curves) figure.draw(); },
  load() { return Promise.all(figures.filter((figure) => figure.seen).map((figure) => figure.load())); },
  refresh() { return charts.load(); },
};
