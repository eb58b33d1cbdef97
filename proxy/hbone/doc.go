// Package hbone is HTTP/2 as the mesh uses it: CONNECT over mutual TLS, many streams per tunnel, and nothing
// else. It has both ends (ClientConn, ServerConn), the pool of tunnels that outbound traffic shares (Pool), the
// record layer beneath them (Client, Server), and the headers that CONNECT carries (Baggage and others).
//
// What flows through it: the bytes of application connections, as Streams (net.Conn with two independent
// directions). Who calls it: proxy's outbound path through Pool, its inbound path through NewServerConn. What it
// never does: dial, choose a destination, judge a peer's identity, log a connection, or speak any other HTTP.
//
// Words:
//
//   - tunnel: one TLS connection between two proxies with HTTP/2 on it. conn is one, whichever end it is; ClientConn
//     and ServerConn are what its users see; pooled is one in the Pool, which keeps those of one Key on a shelf.
//   - stream: one CONNECT on a tunnel, and the bytes that follow (Stream). ServerStream is one that awaits its answer.
//   - tlsConn: what is beneath a tunnel, before it is one. wire is the socket's bytes, records their TLS records,
//     direction the keys of one way, guard what makes sure that one goroutine uses them.
//   - turn: leave to compute a handshake (Turn). The streams' turns are the queues of write.go.
//   - the ends of things. GOAWAY: no new streams (drain); gone well: the peer's came with NO_ERROR. leave: GOAWAY and
//     an end, what is queued goes out. part: the flusher's last act, the tunnel's last record (closeNotify); parting:
//     we have written our last byte and listen on, so that no reset overtakes it. linger: a closed stream that still
//     sends what was written before (Config.Linger, as SO_LINGER). crash: a goroutine of the tunnel has panicked.
//
// A byte's way out: Stream.ReadFrom reads from its source into a frame buffer behind the room for the frame header
// (the one copy); whoever adds something to a connection that nobody is writing to becomes its flusher, seals
// frames from where they lie into one output buffer and hands up to 128 KiB at a time to the socket (write.go). A
// byte's way in: the connection's one goroutine reads many records at once, opens them straight into a block,
// and queues slices of it at their streams (read.go, recv.go); Stream.WriteTo hands them to the destination and
// gives credit back. Idle connections have one goroutine and no buffer, idle streams have neither.
//
// Files: config, errors, buffer | wire (bytes from the socket), record and tlsconn (TLS 1.3 records) | conn (life and
// death), parting, guard, read, frames, write, ping | stream, recv, copy, window, sock | client, server, pool, stale
// | headers.
//
// Decisions (2026-11-23):
//   - No net/http: its server cannot half-close a CONNECT tunnel, and it costs half as much again as TLS itself.
//     http2.Framer and hpack do everything but DATA, which goes past them in both directions.
//   - No writer goroutine. The user of a stream writes himself, or leaves it to whoever writes already; the role
//     is handed to a user who waits for his frame anyway. A deadline, Close or Reset calls a user off the socket;
//     a goroutine made for that finishes. The reader never writes: two ends that wait for each other to read
//     cannot happen.
//   - A stream has one frame waiting at most, the connection sends small frames first, bulk in turn, at most
//     Batch bytes at a time, and the kernel keeps at most NotSentLowat unsent. So a small message waits for a few
//     hundred KiB at worst (measured: 0.5 ms beside 8 bulk streams on loopback). Tunnels of their own for
//     elephants were not needed for that.
//   - The record layer is taken over from crypto/tls after the handshake, by way of KeyLogWriter: sealing in batches
//     and opening in place of copying saved about a quarter of the processor time per byte, kernel included, against
//     bare crypto/tls (medians 1.36 and 1.82 CPU-s per GB, both ends, on a busy machine; BenchmarkMux). Only TLS 1.3
//     with AES-GCM; otherwise, and in FIPS 140 mode, crypto/tls stays. During the handshake crypto/tls is given
//     record by record, and tickets are off, so that both counts start at zero.
//   - Close of an unfinished stream is RST_STREAM CANCEL after what was written (NO_ERROR from a server that has
//     ended its direction), as the h2 library does for ztunnel; CloseWrite is the orderly end.
//   - Better than ztunnel (spec 14): a full tunnel is used again, a failed dial is everybody's at once, per-key
//     state goes away, the idle time counts from the last stream's end, an unanswered PING is forgiven while
//     anything arrives, streams opened between the two GOAWAYs are served, requests that were certainly not
//     processed are sent again, header parsing cannot crash.
//   - 2026-11-28: a reader sees io.EOF after END_STREAM only. RST_STREAM before it is a reset, CANCEL and NO_ERROR
//     included (the h2 library, and so ztunnel, makes an end of file of those). The end of a connection whose client
//     said GOAWAY with NO_ERROR before stays an end of file: curl and its like end tunnels in that way.
//   - 2026-11-29: after END_STREAM a reset is the end of our own direction alone, whatever its code. An error code
//     (CONNECT_ERROR: the far application wrote all, ended, and left with something unread) tore the reader after 200
//     ms, and what a slow one had not taken yet was lost. The h2 library, and the kernel's TCP, hand out what was
//     received. Who carries a stream learns of it (OnStopSending), and ends the far side once that has everything.
//   - 2026-11-28: a request that a tunnel from before leaves without an answer is sent once more, on a tunnel that is
//     newer than the failure (so that ten stale ones cost one failure, not ten). Silence is told from slowness by a
//     PING (stale.go): the peer may take its whole connect timeout to answer, a black hole costs 1.3 s.
//   - 2026-11-28: a reader who pauses stalls itself only (window.go). In ztunnel, and here before, four of them held
//     the connection's whole window (16 MiB against 4 MiB each) and all others of the tunnel waited. SETTINGS still
//     announce ztunnel's 4 MiB; once 1 MiB lies unread and there are more than three streams they are followed by
//     64 KiB, and windows grow with their readers. Towards peers that keep such windows, a stream leaves as much of
//     the connection's window as it uses; a client opens new streams on another tunnel when half of it is away, and
//     a server says GOAWAY so that its client does. What remains: streams that are open on such a tunnel already
//     when more than some eight of its readers pause at a ztunnel peer wait with them.
//   - 2026-11-28: one goroutine at a time seals, and one opens; a guard at each key checks it at run time (guard.go:
//     panic in tests, an error in life). The first key of a connection seals 100 records only, so that changing keys
//     is in daily use with every kind of peer. FuzzRecordsOracle compares the reader with crypto/tls, TestOpenSSL
//     both suites with OpenSSL.
//   - 2026-11-28: frames that serve nothing have accounts (limits.go) which honest peers cannot overdraw:
//     WINDOW_UPDATEs are earned by our DATA, frames on streams that are over by what their windows had left. Refusals
//     beyond 1,000 wait for their turn instead of ending the tunnel: other pods' streams are on it. A header list that
//     is too large is 431 on its stream, up to four times the bound; beyond that decoding it costs too much.
//   - 2026-11-28: content-length on CONNECT has to be a number and is not compared with anything (as nghttp2 does; the
//     h2 library compares): a tunnel has no content.
//   - 2026-11-29: a user who has something small to say (CONNECT, its answer, END_STREAM) writes it himself as far
//     as the socket takes it without waiting, after those who are ready to run have said theirs if there are other
//     streams (flushHere); END_STREAM goes with the last bytes if the source knows in time that they are
//     (ReadToEnd). A goroutine was started for each before. The reader still leaves writing to others: what it would
//     gain is small, and its streams would wait.
//   - 2026-11-29: between a stream and an application's kernel socket (redirected, rootless and dedicated pods) bytes
//     go as between tunnel and socket: read in the poller's callback straight into the frame, written many pieces at
//     once (ReadFromSocket, WriteToSocket). Before, net's own copying read at most 32 KiB into a buffer of its own,
//     which an idle connection held as well. A redirected pod's bulk costs a quarter less processor time (2.7 to 2.0
//     CPU-s per GB, both daemons), and is 1.2 to 1.5 times as fast.
package hbone
