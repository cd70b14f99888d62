async (value) => {
  // Gradio draws the traces and the layout of a figure and leaves its frames out.
  // Wait for the chart this was called for, take the old frames away and add the new ones.
  const figure = value && value.plot ? JSON.parse(value.plot) : {};
  const frames = figure.frames || [];
  for (let tries = 0; frames.length && tries < 200; tries++) {
    const chart = document.querySelector("#motion .js-plotly-plot");
    const slider = chart && chart.layout && (chart.layout.sliders || [])[0];
    if (window.Plotly && slider && slider.steps.length === frames.length) {
      const old = (chart._transitionData && chart._transitionData._frames) || [];
      await window.Plotly.deleteFrames(chart, old.map((_, i) => i));
      await window.Plotly.addFrames(chart, frames);
      return;
    }
    await new Promise((resume) => setTimeout(resume, 50));
  }
}
