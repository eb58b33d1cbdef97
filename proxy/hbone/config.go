package hbone

import (
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"ztun/proxy/fair"
	"ztun/proxy/rescue"
)

// Config is what a connection is told; zero values mean the defaults given here, which are ztunnel's where it has them.
type Config struct {
	// StreamWindow is the largest receive window of a stream in bytes (4 MiB), and the first one
	// (SETTINGS_INITIAL_WINDOW_SIZE) while a connection has few streams; then windows grow as their users read
	// (window.go).
	StreamWindow uint32
	// ConnWindow is the receive window of the connection in bytes (16 MiB), and what the windows of its streams may
	// have grown by together. A peer can make us hold twice as much unread.
	ConnWindow uint32
	// FrameSize is the largest frame that the peer may send, in bytes (SETTINGS_MAX_FRAME_SIZE, 1 MiB).
	FrameSize uint32
	// MaxStreams is how many streams a client may have open at a server (SETTINGS_MAX_CONCURRENT_STREAMS, 200).
	// On a client it caps what the server allows (no own limit when 0).
	MaxStreams uint32
	// MaxHeaderList is the largest header list accepted, in bytes (16384 on clients, 65536 on servers).
	MaxHeaderList uint32

	// PingEvery is the time to the first PING and from each answer to the next PING (10 s); negative: no pings.
	PingEvery time.Duration
	// PingTimeout is how long a PING may stay unanswered while nothing else arrives either (20 s).
	PingTimeout time.Duration
	// PrefaceTimeout bounds the wait for the peer's preface and first SETTINGS (10 s).
	PrefaceTimeout time.Duration
	// Linger bounds how long a closed stream waits for window to send what was written before Close (30 s).
	Linger time.Duration

	// Batch is how many bytes one write to the socket carries at most, roughly (128 KiB). Bulk data that waits
	// for its turn waits in its stream's one frame buffer, never behind more than one batch.
	Batch int
	// NotSentLowat is TCP_NOTSENT_LOWAT of the socket beneath, in bytes (128 KiB; negative: leave it alone): how
	// much the kernel takes beyond what it has sent, and so what a small message may have to wait behind.
	NotSentLowat int
	// Resets is how many streams a client may reset before they were answered, and how many stream errors it may
	// cause, in a burst (200; refilled with a quarter of it per second) before ENHANCE_YOUR_CALM.
	Resets int
	// ControlFrames is how many frames that serve nothing a peer may send in a burst (PING, SETTINGS, PRIORITY, unknown
	// ones, empty DATA, WINDOW_UPDATE beyond what our DATA explains, frames on streams that are over beyond what can
	// have been on its way; 1000, refilled with a tenth of it per second) before ENHANCE_YOUR_CALM.
	ControlFrames int
	// Calmed is told of each peer whose connection was ended with ENHANCE_YOUR_CALM. Locks are held: it returns at once.
	Calmed func(peer net.Addr)

	// Panics catches those of the connection's goroutines, which then end the connection; nil: nobody does.
	Panics *rescue.Panics
	// Go starts a goroutine for a request's handler, or a writer; nil: as the language does.
	Go func(func())
	// Memory is charged with what is received and not read. While it is tight windows are small, of all streams. nil: no
	// bound beyond the windows.
	Memory *fair.Budget
	// Stats counts what bounds turned away, of all connections that were given the same; nil: nobody looks.
	Stats *Stats
	// Buffers are shared by all connections that were given the same; nil: the connection's own.
	Buffers *Buffers
	Logger  *slog.Logger
}

// withDefaults fills in what was left zero.
func (cfg Config) withDefaults(client bool) Config {
	def32 := func(p *uint32, v uint32) {
		if *p == 0 {
			*p = v
		}
	}
	def := func(p *time.Duration, v time.Duration) {
		if *p == 0 {
			*p = v
		}
	}
	def32(&cfg.StreamWindow, 4<<20)
	def32(&cfg.ConnWindow, 16<<20)
	def32(&cfg.FrameSize, 1<<20)
	cfg.StreamWindow = min(cfg.StreamWindow, 1<<31-1)
	cfg.ConnWindow = min(max(cfg.ConnWindow, 65535), 1<<31-1)
	cfg.FrameSize = min(max(cfg.FrameSize, 16384), 1<<24-1)
	if client {
		def32(&cfg.MaxHeaderList, 16384)
	} else {
		def32(&cfg.MaxHeaderList, 65536)
		def32(&cfg.MaxStreams, 200)
	}
	def(&cfg.PingEvery, 10*time.Second)
	def(&cfg.PingTimeout, 20*time.Second)
	def(&cfg.PrefaceTimeout, 10*time.Second)
	def(&cfg.Linger, 30*time.Second)
	if cfg.Batch <= 0 {
		cfg.Batch = 128 << 10
	}
	if cfg.NotSentLowat == 0 {
		cfg.NotSentLowat = 128 << 10
	}
	if cfg.Resets <= 0 {
		cfg.Resets = 200
	}
	if cfg.ControlFrames <= 0 {
		cfg.ControlFrames = 1000
	}
	if cfg.Buffers == nil {
		cfg.Buffers = new(Buffers)
	}
	if cfg.Stats == nil {
		cfg.Stats = new(Stats)
	}
	if cfg.Go == nil {
		cfg.Go = func(f func()) { go f() }
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return cfg
}

// Stats counts what bounds turned away.
type Stats struct {
	// StreamsRefused counts requests beyond MaxStreams (REFUSED_STREAM).
	StreamsRefused atomic.Uint64
	// StreamsRejected counts streams reset for a fault of the peer's: malformed requests, overdrawn windows.
	StreamsRejected atomic.Uint64
	// Violations counts connections ended for one, ENHANCE_YOUR_CALM included.
	Violations atomic.Uint64
	// Calmed counts those ended with ENHANCE_YOUR_CALM: floods, and answers that nobody read.
	Calmed atomic.Uint64
	// PingTimeouts counts connections given up because the peer fell silent.
	PingTimeouts atomic.Uint64
	// Compacted counts received pieces that were copied because too many large blocks were pinned.
	Compacted atomic.Uint64
	// Withheld counts received pieces for which the connection's window was not given back at once, because too much
	// was unread.
	Withheld atomic.Uint64
	// Rotated counts connections that a server ended gracefully (GOAWAY) because streams whose readers have stopped
	// held most of the client's window.
	Rotated atomic.Uint64
	// Lingered counts closed streams whose last bytes were dropped because the peer gave no window for them.
	Lingered atomic.Uint64
}

// Counts are the figures of a Stats at one moment.
type Counts struct {
	StreamsRefused, StreamsRejected, Violations, Calmed, PingTimeouts, Compacted, Lingered uint64
}

// Counts reads them.
func (s *Stats) Counts() Counts {
	return Counts{
		StreamsRefused: s.StreamsRefused.Load(), StreamsRejected: s.StreamsRejected.Load(), Violations: s.Violations.Load(),
		Calmed:       s.Calmed.Load(),
		PingTimeouts: s.PingTimeouts.Load(), Compacted: s.Compacted.Load(), Lingered: s.Lingered.Load(),
	}
}

// bucket is a token bucket: what a peer may do often, but not all the time.
type bucket struct {
	size, perSecond, left float64
	at                    time.Time
}

func newBucket(size int, perSecond float64) bucket {
	return bucket{size: float64(size), perSecond: perSecond, left: float64(size)}
}

// reserve takes another one, allowed or not yet, and returns how long it has to wait for that.
func (b *bucket) reserve() time.Duration {
	now := time.Now()
	if !b.at.IsZero() {
		b.left = min(b.size, b.left+now.Sub(b.at).Seconds()*b.perSecond)
	}
	b.at = now
	b.left--
	return time.Duration(-b.left / b.perSecond * float64(time.Second))
}

// take reports whether another one is allowed.
func (b *bucket) take() bool {
	if b.left < 1 {
		now := time.Now()
		if !b.at.IsZero() {
			b.left = min(b.size, b.left+now.Sub(b.at).Seconds()*b.perSecond)
		}
		b.at = now
		if b.left < 1 {
			return false
		}
	} else if b.at.IsZero() {
		b.at = time.Now()
	}
	b.left--
	return true
}
