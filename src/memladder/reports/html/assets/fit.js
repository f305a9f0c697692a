// What `memladder fit` says, looked up in tables that the predictor made: nothing is interpolated.
function answers(modelName, gpuName, batch, context) {
  const tables = data.fit, gpu = tables.gpus.find((one) => one.name === gpuName);
  const b = tables.batches.indexOf(batch), c = tables.contexts.indexOf(context);
  const rows = tables.models.find((one) => one.name === modelName).rows.map((row) => {
    const found = row.tables[gpu.generation] ?? row.tables[0];
    const named = { framework: row.framework, format: row.format };
    if (found.reason) return { ...named, reason: found.reason };
    const needed = found.totals[b][c], margin = found.margins[b][c] + gpu.spread;
    const left = gpu.usable - needed;
    return { ...named, needed, low: Math.max(needed - margin, 0), high: needed + margin, left, fits: left >= 0, surely: left >= margin };
  });
  const lost = (row) => tables.loss.indexOf(row.format);
  return rows.filter((row) => !row.reason).sort((a, z) => z.fits - a.fits || lost(a) - lost(z) || z.left - a.left)
    .concat(rows.filter((row) => row.reason));
}

function drawAnswer() {
  const [model, gpu, batch, context] = ['fit-model', 'fit-gpu', 'fit-batch', 'fit-context'].map((id) => $(id).value);
  const framework = $('fit-framework').value, format = $('fit-format').value;
  const rows = answers(model, gpu, Number(batch), Number(context)).filter((row) =>
    (!framework || row.framework === framework) && (!format || row.format === format));
  const best = rows.find((row) => row.fits);
  const closest = rows.filter((row) => !row.reason).sort((a, z) => z.left - a.left)[0];
  $('answer').className = `answer ${best ? (best.surely ? 'good' : 'just') : 'bad'}`;
  $('answer').textContent = best
    ? `${best.surely ? 'Yes' : 'Just'}: ${best.framework} in ${best.format}, ${sized(best.needed)}, leaves ${sized(best.left)} on ${gpu}`
    : closest ? `No: the closest, ${closest.framework} in ${closest.format}, needs ${sized(-closest.left)} more than ${gpu} has` : 'The rules have no answer to this.';
  const limit = data.fit.models.find((one) => one.name === model).positions;
  if (limit && Number(context) > limit) $('answer').textContent += `; but ${Number(context).toLocaleString('en-US')} tokens are more than the model’s ${limit.toLocaleString('en-US')}`;
  $('fits').replaceChildren(
    heading([['framework'], ['format'], ['needed, GiB', true], ['19 of 20, GiB', true], ['left, GiB', true], ['predicted']]),
    make('tbody', {}, ...rows.map((row) => make('tr', {}, make('th', { scope: 'row' }, row.framework), make('td', {}, row.format), ...(row.reason
      ? [make('td', { colspan: 4 }, row.reason)]
      : [make('td', { class: 'number' }, number(row.needed / MIB / 1024, 2)),
        make('td', { class: 'number' }, `${number(row.low / MIB / 1024, 2)} to ${number(row.high / MIB / 1024, 2)}`),
        make('td', { class: 'number' }, number(row.left / MIB / 1024, 2)),
        make('td', {}, make('span', { class: `tag ${row.fits ? (row.surely ? 'good' : 'just') : 'bad'}` }, row.fits ? (row.surely ? 'fits' : 'just') : 'no'))])))),
  );
}

function drawForm() {
  if (!data.fit) return;
  $('fit').hidden = $('to-fit').hidden = false;
  const { models, gpus, batches, contexts, loss } = data.fit;
  const plain = (value) => [value, value.toLocaleString('en-US')];
  const frameworks = [...new Set(models.flatMap((model) => model.rows.map((row) => row.framework)))];
  const formats = loss.filter((format) => models.some((model) => model.rows.some((row) => row.format === format)));
  const fields = [
    ['fit-model', 'model', models.map((model) => [model.name, model.name]), models[0].name],
    ['fit-gpu', 'GPU', gpus.map((gpu) => [gpu.name, `${gpu.name}, ${number(gpu.usable / MIB / 1024, 0)} GiB`]), 'H100'],
    ['fit-framework', 'framework', [['', 'any'], ...frameworks.map((name) => [name, name])], ''],
    ['fit-format', 'format', [['', 'any'], ...formats.map((name) => [name, name])], ''],
    ['fit-batch', 'batch', batches.map(plain), 1], ['fit-context', 'context, tokens', contexts.map(plain), 4096],
  ];
  for (const [id, title, options, chosen] of fields) {
    const select = make('select', { id, onchange: drawAnswer }, ...options.map(([value, text]) => make('option', { value }, text)));
    select.value = chosen;
    $('question').append(make('label', { for: id }, title, select));
  }
  $('question').addEventListener('submit', (event) => event.preventDefault());
  $('fit-about').textContent = 'Whole models on one GPU, predicted by memladder’s rules; answers are exact for the batches and contexts offered, and no others are. ' +
    'The cache is as wide as the activations. `memladder fit` answers any model, number of GPUs, cache format, batch and context.';
  drawAnswer();
}
