const VERDICTS = {
  change: ['change', 'bad', 'more than the repeats of either differ'],
  once: ['once', 'just', 'more than a page, but a case ran only once: its noise is not known'],
  noise: ['noise', 'quiet', 'no more than the repeats differ'],
  same: ['same', 'quiet', 'within a 2 MiB page of the driver, or 1 % of a process on the CPU'],
};

function drawComparison() {
  const pairs = data.compared;
  if (!pairs) return;
  const section = $('compare');
  section.hidden = $('to-compare').hidden = false;
  const [one, two] = data.stores;
  const body = make('tbody');
  const fill = () => {
    const all = every.checked;
    body.replaceChildren(...pairs.filter((pair) => all || pair.verdict === 'change' || pair.verdict === 'once').map((pair) => {
      const [name, look, why] = VERDICTS[pair.verdict], grown = pair.after - pair.before;
      return make('tr', {}, make('th', { scope: 'row' }, pair.id), make('td', { class: 'number' }, mib(pair.before)),
        make('td', { class: 'number' }, mib(pair.after)), make('td', { class: 'number' }, signed(grown)),
        make('td', { class: 'number' }, `${signed((100 * grown * MIB) / pair.before)} %`),
        make('td', {}, make('span', { class: `tag ${look}`, title: why }, name)),
        make('td', {}, pair.changes.slice(0, 5).map(([part, size]) => `${words(part)} ${signed(size)}`).join(' · ')));
    }));
    if (!body.children.length) body.append(make('tr', {}, make('td', { colspan: 7 }, pairs.length ? 'Nothing differs by more than noise.' : 'No measured cell is in both.')));
  };
  const every = make('input', { type: 'checkbox', id: 'every', onchange: fill });
  const count = (verdict) => pairs.filter((pair) => pair.verdict === verdict).length;
  section.replaceChildren(
    make('div', { class: 'head' }, make('h2', { id: 'compare-title' }, `${two} against ${one}`),
      make('label', { class: 'switches' }, every, ' noise too')),
    make('p', { class: 'quiet' }, `${pairs.length} cells measured in both: ` +
      Object.keys(VERDICTS).map((verdict) => `${count(verdict)} ${VERDICTS[verdict][0]} (${VERDICTS[verdict][2]})`).join('; ') + '.'),
    make('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'Differences' }, make('table', { id: 'differences' },
      heading([['case'], [`${one}, MiB`, true], [`${two}, MiB`, true], ['difference', true], ['in %', true], ['kind'], ['by category, MiB']]), body)),
  );
  fill();
}
