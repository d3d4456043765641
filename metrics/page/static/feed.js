// The line to the engine: server-sent events, opened again whenever it breaks or falls silent.

const SILENCE = 12000; // the engine says something every 5 seconds
const FIRST_RETRY = 500;
const LAST_RETRY = 8000;

// Calls ``told(update)`` for each message, and ``changed("connecting" | "live" | "lost")``.
export function follow(url, told, changed) {
  let source = null;
  let retry = FIRST_RETRY;
  let timer = 0;

  function open() {
    source = new EventSource(url);
    source.onmessage = (message) => {
      told(JSON.parse(message.data));
      retry = FIRST_RETRY;
      changed("live");
      listen();
    };
    source.onerror = lost;
    listen();
  }

  function listen() {
    clearTimeout(timer);
    timer = setTimeout(lost, SILENCE);
  }

  function lost() {
    clearTimeout(timer);
    source.close();
    changed("lost");
    timer = setTimeout(open, retry);
    retry = Math.min(retry * 2, LAST_RETRY);
  }

  changed("connecting");
  open();
  addEventListener("pagehide", () => {
    clearTimeout(timer);
    source.close();
  });
  addEventListener("pageshow", (event) => event.persisted && open());
}
