function tipOf(index) {
  const row = data.rows[index], more = details().cells[index];
  const settings = Object.entries(more.raw.settings).map(([name, value]) => `${name}=${value}`).join(' ');
  const ledger = (more.ledger ?? []).filter((entry) => entry[1]).map((entry) => `${words(entry[0])} ${mib(entry[1])}`).join(' · ');
  return [
    make('strong', {}, `${label(row)}, ${row.modelTitle} ${row.workload}`),
    facts([
      ['status', row.problem ? `${row.status}, ${row.problem}` : STATUS[row.status]],
      ['bytes', row.bytes === null ? null : `${row.bytes.toLocaleString('en-US')} (${sized(row.bytes)})`],
      ['peak', row.peak === null ? null : sized(row.peak)],
      ['predicted', row.predicted === null ? null : `${sized(row.predicted)} (${sized(row.low)} to ${sized(row.high)})`],
      ['published', row.published === null ? null : sized(row.published)],
      ['budget', row.budget === null ? null : sized(row.budget)],
      ['ledger, MiB', ledger], ['settings', settings.slice(0, 300)], ['reason', row.reason],
    ]),
  ];
}

function showTip(button) {
  const tip = $('tip');
  tip.replaceChildren(...tipOf(Number(button.dataset.index)));
  tip.hidden = false;
  const around = button.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const below = around.bottom + 6 + own.height < innerHeight;
  tip.style.top = `${below ? around.bottom + 6 : Math.max(4, around.top - own.height - 6)}px`;
  tip.style.left = `${Math.max(4, Math.min(around.left + 220, innerWidth - own.width - 8))}px`;
}

function ledgerTable(measured, predicted) {
  const names = [...new Set([...(measured ?? []), ...(predicted ?? [])].map((entry) => entry[0]))];
  const find = (list, name) => (list ?? []).find((entry) => entry[0] === name);
  const body = make('tbody');
  for (const name of names) {
    const one = find(measured, name), two = find(predicted, name);
    const swatch = make('span', { class: 'swatch' });
    swatch.style.background = hue(name);
    body.append(make('tr', {}, make('th', { scope: 'row' }, swatch, words(name)),
      make('td', { class: 'number' }, one ? mib(one[1]) : ''), make('td', {}, one ? one[2] : ''),
      make('td', { class: 'number' }, two ? mib(two[1]) : ''),
      make('td', {}, (one && one[3]) || (two && two[3]) || '')));
  }
  const total = (list) => (list ? mib(sum(list.map((entry) => entry[1]))) : '');
  body.append(make('tr', {}, make('th', { scope: 'row' }, 'total'), make('td', { class: 'number' }, total(measured)), make('td'),
    make('td', { class: 'number' }, total(predicted)), make('td')));
  return make('table', {}, heading([['category'], ['here, MiB', true], ['known'], ['predicted, MiB', true], ['note']]), body);
}

function timeline(trace) {
  const NS = 'http://www.w3.org/2000/svg', W = 900, H = 200, L = 70, B = 34, T = 22;
  const node = (name, given, text) => {
    const made = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(given)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const end = Math.max(1, ...trace.times, ...trace.phases.map((phase) => phase[2]));
  const most = Math.max(MIB, ...trace.sizes, ...trace.phases.map((phase) => phase[3])) * 1.05;
  const x = (time) => L + ((W - L - 6) * time) / end, y = (size) => H - B - ((H - B - T) * size) / most;
  const svg = node('svg', { class: 'time', viewBox: `0 0 ${W} ${H}`, role: 'img',
    'aria-label': `Memory over ${number(end / 1000)} seconds: ` + trace.phases.map((p) => `${p[0]} up to ${sized(p[3])}`).join(', ') });
  let last = -Infinity;
  trace.phases.forEach(([name, from, to], index) => {
    if (index % 2 === 0) svg.append(node('rect', { class: 'band', x: x(from), y: T, width: Math.max(0, x(to) - x(from)), height: H - B - T }));
    if (x(from) < last) return;
    svg.append(node('text', { x: x(from) + 2, y: T - 7 }, name));
    last = x(from) + 7 * name.length + 6;
  });
  for (const part of [0, 0.5, 1]) {
    const size = (most / 1.05) * part;
    svg.append(node('line', { class: 'edge', x1: L, x2: W - 6, y1: y(size), y2: y(size) }));
    svg.append(node('text', { x: L - 6, y: y(size) + 4, 'text-anchor': 'end' }, number(size / MIB, 0)));
    svg.append(node('text', { x: Math.min(x(end * part), W - 8), y: H - B + 16, 'text-anchor': part === 1 ? 'end' : 'middle' }, `${number((end * part) / 1000)} s`));
  }
  svg.append(node('text', { x: 0, y: T - 7 }, 'MiB'));
  if (trace.times.length > 1) {
    svg.append(node('polyline', { class: 'line', points: trace.times.map((time, i) => `${x(time).toFixed(1)},${y(trace.sizes[i]).toFixed(1)}`).join(' ') }));
  }
  return svg;
}

const text = (value) => JSON.stringify(value, null, 1);
const folded = (name, ...inside) => make('details', {}, make('summary', {}, name), ...inside);

function ledgers(row, more) {
  const parts = [make('h3', {}, 'Where the bytes are')];
  const kind = row.status === 'planned' ? 'planned' : 'measured';
  const both = [[kind, more.ledger], ['predicted', more.predictedLedger]].filter(([, list]) => list);
  if (!both.length) return [];
  const most = Math.max(...both.map(([, list]) => sum(list.map((entry) => Math.max(0, entry[1])))));
  for (const [name, list] of both) {
    parts.push(make('div', { class: 'quiet' }, `${name}, ${sized(sum(list.map((entry) => entry[1])))}`), stack(list, most, name));
  }
  parts.push(make('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'Ledger' }, ledgerTable(more.ledger, more.predictedLedger)));
  if (row.predicted && row.status === 'measured') {
    const within = row.low <= row.bytes && row.bytes <= row.high;
    parts.push(make('p', {}, `Predicted ${sized(row.predicted)} (${sized(row.low)} to ${sized(row.high)}): `,
      make('strong', {}, `${number(100 * (row.predicted / row.bytes - 1), 2)} %`),
      ` off; the measurement is ${within ? 'within' : 'outside'} the interval. These rules may have been made on this very cell.`));
  }
  return parts;
}

function openCell(index) {
  const row = data.rows[index], more = details().cells[index], environment = details().environments[more.environment];
  const dialog = $('cell');
  const copy = make('button', { type: 'button', onclick: () => {
    navigator.clipboard?.writeText(more.command).then(() => { copy.textContent = 'Copied'; }, () => { copy.textContent = 'Select it, and copy'; });
  } }, 'Copy');
  const quiet = (line) => make('p', { class: 'quiet' }, line);
  dialog.replaceChildren(
    make('div', { class: 'head' }, make('h2', { id: 'cell-title' }, `${label(row)}: ${row.modelTitle}, ${row.workload}, ${row.scope}`),
      make('button', { type: 'button', onclick: () => dialog.close() }, 'Close')),
    facts([
      ['case', row.id], ['device', row.device], ['status', row.problem ? `${row.status}, ${row.problem}` : STATUS[row.status]],
      ['bytes', row.bytes === null ? null : `${row.bytes.toLocaleString('en-US')} (${sized(row.bytes)})`],
      ['peak', row.peak === null ? null : sized(row.peak)],
      ['runs', row.runs ? `${row.runs}, ${row.noise === null ? 'noise not known' : `${sized(row.noise)} apart at the most`}` : null],
      ['published', row.published === null ? null : sized(row.published)],
      ['budget', row.budget === null ? null : row.bytes === null ? sized(row.budget) : `${sized(row.budget)}${row.base === null ? '' : `; the cell takes ${signed(row.bytes - row.base - row.budget)} MiB beside it and its context of ${sized(row.base)}`}`],
      ['reason', row.reason], ['to get it', more.raw.hint], ['not predicted', more.unpredicted],
    ]),
    ...ledgers(row, more),
    ...more.notes.map(quiet),
    ...more.traces.flatMap((trace, run) => [
      make('h3', {}, more.traces.length > 1 ? `Memory over time, run ${run + 1}` : 'Memory over time'), timeline(trace),
      quiet(`${trace.source}, started ${trace.started}; of each stretch the highest reading is drawn`),
    ]),
    make('h3', {}, 'To measure it again'), make('pre', { tabindex: 0 }, more.command), copy,
    ...(more.custom ? [quiet('config.json: a file with the layer’s configuration, which the raw record has.')] : []),
    make('h3', {}, 'Behind it'),
    folded('Settings', facts(Object.entries(more.raw.settings).map(([name, one]) => [name, String(one)]))),
    folded('Environment', make('pre', { tabindex: 0 }, text(environment))),
    folded('Raw record', make('pre', { tabindex: 0 }, text(more.raw))),
  );
  $('tip').hidden = true;
  dialog.showModal();
  dialog.scrollTop = 0;
}

function listenToCells() {
  const chart = $('chart');
  const rowOf = (event) => event.target.closest('.row');
  for (const kind of ['mouseover', 'focusin']) {
    chart.addEventListener(kind, (event) => { if (rowOf(event)) showTip(rowOf(event)); });
  }
  for (const kind of ['mouseleave', 'focusout']) chart.addEventListener(kind, () => { $('tip').hidden = true; });
  document.addEventListener('keydown', (event) => { if (event.key === 'Escape') $('tip').hidden = true; });
  document.addEventListener('scroll', () => { $('tip').hidden = true; }, { passive: true });
  chart.addEventListener('click', (event) => { if (rowOf(event)) openCell(Number(rowOf(event).dataset.index)); });
  // Up and down go from bar to bar.
  chart.addEventListener('keydown', (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || !rowOf(event)) return;
    const rows = [...chart.querySelectorAll('.row')];
    rows[rows.indexOf(rowOf(event)) + step]?.focus();
    event.preventDefault();
  });
  $('cell').addEventListener('click', (event) => { if (event.target === $('cell')) $('cell').close(); });
}
