// Texts of records are only ever set as text: nothing here parses markup.
const MIB = 1048576;
const $ = (id) => document.getElementById(id);
const data = JSON.parse($('rows').textContent);
let heavy = null;
// Large, and not needed to draw the first figure.
const details = () => (heavy ??= JSON.parse($('details').textContent));

function make(name, given = {}, ...inside) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else if (key === 'class') node.className = value;
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...inside.filter((part) => part !== null && part !== undefined).map(shown));
  return node;
}

// What is not printable, or turns the direction of text, is written as its number.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const escaped = (text) => text.replace(HIDDEN, (c) => '\\u' + c.charCodeAt(0).toString(16).padStart(4, '0'));
const shown = (part) => (part instanceof Node ? part : escaped(String(part)));

const number = (value, digits = 1) =>
  value.toLocaleString('en-US', { minimumFractionDigits: digits, maximumFractionDigits: digits });
const mib = (bytes) => (bytes === null || bytes === undefined ? '' : number(bytes / MIB));
const sized = (bytes) =>
  Math.abs(bytes) >= 10 * 1024 * MIB ? `${number(bytes / MIB / 1024, 2)} GiB` : `${mib(bytes)} MiB`;
const signed = (bytes) => (bytes > 0 ? '+' : bytes < 0 ? '−' : '') + mib(Math.abs(bytes));
const label = (row) => (data.stores.length > 1 ? `${row.system} · ${data.stores[row.store]}` : row.system);
const sum = (list) => list.reduce((total, one) => total + one, 0);

const STATUS = {
  measured: 'measured', planned: 'planned by a compiler, not run', predicted: 'predicted, not run',
  oom: 'out of memory', busy: 'others held the memory', unavailable: 'not available',
  failed: 'failed', timeout: 'timeout',
};
// Why a cell has no bar, or null.
const missing = (row) => row.problem ?? (row.bytes === null ? STATUS[row.status] : null);

function facts(pairs) {
  const list = make('dl');
  for (const [name, value] of pairs) {
    if (value !== null && value !== undefined && value !== '') {
      list.append(make('dt', {}, name), make('dd', {}, value));
    }
  }
  return list;
}

function heading(names) {
  return make('thead', {}, make('tr', {}, ...names.map(([name, right]) =>
    make('th', { scope: 'col', class: right ? 'number' : '' }, name))));
}

// Hues that stay apart for most eyes, light and dark; the names stand beside them.
const HUES = {
  weights: '#3f8cc8', scales: '#8fc3e8', embeddings: '#0a4a90', kv_cache: '#33b38f', activations: '#e69f00',
  inputs_outputs: '#f3cd74', workspace: '#cc79a7', context: '#7a8490', modules: '#a9b2bc', libraries: '#7a8490',
  interpreter: '#c5ccd3', allocator_slack: '#d55e00', allocator: '#f0a06a', graphs: '#8f3a6e', heap: '#a47c48',
  driver_step: '#6b4a2b', residual: '#c4342d', constants: '#8fc3e8', inputs_and_outputs: '#f3cd74',
  cuda_context: '#7a8490',
};
const hue = (name) => HUES[name] ?? '#8a8f3c';
const words = (name) => name.replaceAll('_', ' ').replace('kv cache', 'KV cache').replace('cuda', 'CUDA');

function stack(entries, total, name) {
  const bar = make('div', { class: 'stack', role: 'img', 'aria-label': `${name}: ` +
    entries.map((e) => `${words(e[0])} ${sized(e[1])}`).join(', ') });
  for (const [category, bytes] of entries) {
    if (bytes <= 0) continue;
    const part = make('i', { title: `${words(category)}: ${sized(bytes)}` });
    part.style.background = hue(category);
    part.style.width = `${(100 * bytes) / total}%`;
    bar.append(part);
  }
  return bar;
}

function save(name, type, text) {
  const link = make('a', { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
