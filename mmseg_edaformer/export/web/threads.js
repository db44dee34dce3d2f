/** A service worker that adds headers: browsers give threads to isolated pages alone. */
const scope = /** @type {any} */ (self);
const headers = {
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Embedder-Policy': 'require-corp',
  'Content-Security-Policy': "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; " +
    "img-src 'self' blob: data:; worker-src 'self' blob:",
};
scope.addEventListener('install', () => scope.skipWaiting());
scope.addEventListener('activate', event => event.waitUntil(scope.clients.claim()));
scope.addEventListener('fetch', event => {
  if (new URL(event.request.url).origin !== location.origin) return;
  event.respondWith(fetch(event.request).then(answer => {
    if (!answer.body) return answer;
    const more = new Headers(answer.headers);
    for (const [name, value] of Object.entries(headers)) more.set(name, value);
    return new Response(answer.body, { status: answer.status, headers: more });
  }));
});
