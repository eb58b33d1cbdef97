// An HTTP/2 server of Node's own http2 module that answers CONNECT, as a pod of a mesh would: node server.mjs '{"host": ..., "port": ..., "pem": {...}}'.
// It prints a line of JSON when it listens and one per request; lines on its standard input are commands. interop.go's nodeServer starts it.
import fs from 'node:fs';
import http2 from 'node:http2';
import net from 'node:net';
import readline from 'node:readline';

const o = JSON.parse(process.argv[2]);
const { NGHTTP2_CONNECT_ERROR } = http2.constants;
const say = (x) => process.stdout.write(JSON.stringify(x) + '\n');
const sessions = new Set();

const server = http2.createSecureServer({
  cert: fs.readFileSync(o.pem.cert),
  key: fs.readFileSync(o.pem.key),
  ca: fs.readFileSync(o.pem.roots),
  requestCert: true,
  rejectUnauthorized: true,
  minVersion: 'TLSv1.3',
  settings: o.settings,
  paddingStrategy: o.padding ? http2.constants.PADDING_STRATEGY_MAX : http2.constants.PADDING_STRATEGY_NONE,
});

server.on('session', (session) => {
  sessions.add(session);
  session.on('close', () => sessions.delete(session));
  session.on('error', (e) => say({ sessionError: e.message }));
  if (o.window) session.setLocalWindowSize(o.window);
  if (o.chatter) {
    // Frames that a CONNECT client has no use for.
    session.altsvc('h2=":8000"', 'https://example.org:80');
    session.origin('https://example.com', 'https://example.org');
    session.ping(() => {});
  }
});
server.on('sessionError', (e) => say({ sessionError: e.message }));

server.on('stream', (stream, headers) => {
  say({ headers, san: stream.session.socket.getPeerCertificate().subjectaltname });
  stream.on('error', (e) => say({ streamError: e.message }));
  const authority = headers[':authority'] ?? '';
  if (headers[':method'] !== 'CONNECT') return stream.respond({ ':status': 405 }, { endStream: true });
  if (authority.startsWith('refuse-with-')) return stream.respond({ ':status': Number(authority.slice(12, 15)) }, { endStream: true });
  if (authority.startsWith('silent')) return stream.on('close', () => say({ closed: authority, code: stream.rstCode }));
  const i = authority.lastIndexOf(':');
  const host = authority.slice(0, i).replace(/^\[|\]$/g, '');
  const app = net.connect({ host, port: Number(authority.slice(i + 1)), allowHalfOpen: true });
  let open = false;
  app.on('connect', () => {
    open = true;
    stream.respond({ ':status': 200 });
    app.pipe(stream);
    stream.pipe(app);
  });
  app.on('error', () => {
    if (stream.destroyed) return;
    if (open) stream.close(NGHTTP2_CONNECT_ERROR);
    else stream.respond({ ':status': 503 }, { endStream: true });
  });
  stream.on('close', () => {
    if (stream.rstCode !== 0) app.destroy(); // not resetAndDestroy: Node loses a socket whose end was sent already
  });
});

readline.createInterface({ input: process.stdin }).on('line', (command) => {
  if (command === 'drain') for (const s of sessions) s.close(); // GOAWAY; streams may finish
  if (command === 'sessions') say({ sessions: sessions.size });
}).on('close', () => process.exit(0)); // whoever started us is gone

server.listen({ host: o.host, port: o.port }, () => say({ listening: true }));
