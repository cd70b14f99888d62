// A chart of a figure in JSON. gr.Plot makes a new chart of every value, and the zoom is gone; this
// one changes the chart it has.
const box = element.querySelector('.chart');
const draw = () => {
  if (!window.Plotly) return void setTimeout(draw, 300);
  if (!props.value) return void window.Plotly.purge(box);
  const figure = JSON.parse(props.value);
  const layout = {...figure.layout, autosize: true};
  window.Plotly.react(box, figure.data, layout, {responsive: true});
};
watch('value', draw);
draw();
