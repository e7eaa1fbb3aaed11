// Before anything is drawn: the theme that was chosen last.
try {
  const theme = localStorage.getItem('retort.theme');
  if (theme === 'dark' || theme === 'light') document.documentElement.dataset.theme = theme;
} catch { /* Storage may be forbidden. */ }
