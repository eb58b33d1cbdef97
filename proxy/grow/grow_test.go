package grow

import "testing"

// deep uses some 10 KiB of stack in small frames.
//
//go:noinline
func deep(n int) int {
	var pad [256]byte
	pad[n%256] = byte(n)
	if n == 0 {
		return int(pad[0])
	}
	return deep(n-1) + int(pad[n%256])
}

func TestStack(t *testing.T) {
	done := make(chan int)
	go func() {
		Stack()
		done <- deep(30)
	}()
	if got := <-done; got != 465 {
		t.Errorf("%d", got)
	}
}

// The figures of the package's comment: goroutines that go deep, as they are and grown first.
func BenchmarkGoroutine(b *testing.B) {
	for name, first := range map[string]func(){"as it is": func() {}, "grown": Stack} {
		b.Run(name, func(b *testing.B) {
			done := make(chan int)
			for b.Loop() {
				go func() {
					first()
					done <- deep(30)
				}()
				<-done
			}
		})
	}
}

func BenchmarkStack(b *testing.B) {
	for b.Loop() {
		Stack()
	}
}
