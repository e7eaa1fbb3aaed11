// Pictures: an enlarged view with square pixels, and a slider through snapshots of a training.

function look(link) {
  const image = link.querySelector('img');
  const dialog = document.createElement('dialog');
  dialog.className = 'picture';
  const large = new Image();
  large.src = link.href;
  large.alt = image.alt;
  const said = document.createElement('p');
  said.textContent = image.alt;
  const close = document.createElement('button');
  close.textContent = 'Close';
  close.addEventListener('click', () => dialog.close());
  dialog.append(large, said, close);
  dialog.addEventListener('close', () => { dialog.remove(); link.focus(); });
  dialog.addEventListener('click', (event) => { if (event.target === dialog) dialog.close(); });
  // A whole number of times its size, as large as fits.
  const fit = () => {
    const room = Math.min(innerWidth * 0.88 / large.naturalWidth, (innerHeight * 0.8) / large.naturalHeight);
    large.width = Math.round(large.naturalWidth * (room >= 1 ? Math.floor(room) : room));
  };
  large.addEventListener('load', fit);
  document.body.append(dialog);
  dialog.showModal();
}

function strip(section) {
  const frames = [...section.querySelectorAll('.frames figure')];
  const slider = section.querySelector('input[type="range"]');
  const output = section.querySelector('output');
  section.classList.add('slides');
  const show = () => {
    frames.forEach((frame, number) => frame.classList.toggle('shown', number === Number(slider.value)));
    output.textContent = frames[slider.value].dataset.step;
    slider.setAttribute('aria-valuetext', `step ${frames[slider.value].dataset.step}`);
  };
  for (const image of section.querySelectorAll('img')) image.loading = 'eager';
  // The step is a part of the address, so that a link leads to it.
  const at = () => new URL(location.href);
  const wanted = frames.findIndex((frame) => frame.dataset.step === at().searchParams.get('step'));
  if (wanted >= 0) slider.value = wanted;
  slider.addEventListener('input', () => {
    show();
    const address = at();
    address.searchParams.set('step', frames[slider.value].dataset.step);
    history.replaceState(null, '', address);
  });
  show();
}

export const pictures = {
  start() {
    for (const section of document.querySelectorAll('[data-strip]')) strip(section);
    document.addEventListener('click', (event) => {
      const link = event.target.closest('a.zoom');
      if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) return;
      event.preventDefault();
      look(link);
    });
  },
};
