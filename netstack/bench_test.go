package netstack

import (
	"io"
	"testing"
)

// BenchmarkRelay is one connection between two stacks in one process: the cost
// of both of them and of an in-memory link, per MaxWrite bytes.
func BenchmarkRelay(b *testing.B) {
	for _, way := range []string{"WriteTo", "Read"} {
		b.Run(way, func(b *testing.B) {
			j := join(b, true, nil)
			c, s := j.pipe(b, families[0])
			buf := make([]byte, MaxWrite)
			b.SetBytes(MaxWrite)
			b.ReportAllocs()
			done := make(chan struct{})
			go func() {
				defer close(done)
				if way == "WriteTo" {
					s.WriteTo(io.Discard)
				} else {
					io.CopyBuffer(onlyWriter{io.Discard}, struct{ io.Reader }{s}, make([]byte, 64<<10))
				}
			}()
			for b.Loop() {
				if _, err := c.Write(buf); err != nil {
					b.Fatal(err)
				}
			}
			c.CloseWrite()
			<-done
			c.Close()
			s.Close()
		})
	}
}

// BenchmarkPingPong is the round trip of one byte between two stacks.
func BenchmarkPingPong(b *testing.B) {
	j := join(b, true, nil)
	c, s := j.pipe(b, families[0])
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.CopyBuffer(onlyWriter{s}, struct{ io.Reader }{s}, make([]byte, 16))
	}()
	buf := make([]byte, 1)
	b.ReportAllocs()
	for b.Loop() {
		c.Write(buf)
		if _, err := c.Read(buf); err != nil {
			b.Fatal(err)
		}
	}
	c.CloseWrite()
	<-done
	c.Close()
	s.Close()
}

// BenchmarkTUNEcho is the round trip of one byte between a kernel socket and a
// connection of ours, by a real TUN.
func BenchmarkTUNEcho(b *testing.B) {
	l := newLab(b, false, func(f *Flow) {
		c, err := f.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		io.CopyBuffer(onlyWriter{c}, struct{ io.Reader }{c}, make([]byte, 16))
	})
	c, err := l.dial("10.2.0.3:80")
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 1)
	b.ReportAllocs()
	for b.Loop() {
		c.Write(buf)
		if _, err := c.Read(buf); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkTUNConnect is connect, one byte, and the server's close, one after
// the other.
func BenchmarkTUNConnect(b *testing.B) {
	l := newLab(b, false, func(f *Flow) {
		if c, err := f.Accept(); err == nil {
			c.Write([]byte{1})
			c.Close()
		}
	})
	b.ReportAllocs()
	for b.Loop() {
		c, err := l.dial("10.2.0.3:80")
		if err != nil {
			b.Fatal(err)
		}
		io.Copy(io.Discard, c)
		c.Close()
	}
}
