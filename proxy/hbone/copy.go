package hbone

import "io"

// ReadFrom sends what src yields until its end (nil) or an error: a *SourceError if src failed, else as Write.
// It reads straight into the frame that is sent. If src has WaitRead() error (returns when Read would not wait, as
// netstack's connections and Streams have), an idle stream holds no buffer. It does not end our direction.
func (s *Stream) ReadFrom(src io.Reader) (total int64, err error) {
	s.wlock.Lock()
	defer s.wlock.Unlock()
	waiter, _ := src.(interface{ WaitRead() error })
	if waiter == nil {
		waiter, src = pollable(src)
	}
	for {
		if waiter != nil {
			if err := waiter.WaitRead(); err != nil {
				return total, sourceError(err)
			}
		}
		f := s.c.bufs.frame(s.class)
		room := f.room()
		n, rerr := src.Read(room)
		if n > 0 {
			// The buffer grows with what is there to be sent: an echo stays at the smallest.
			switch {
			case n == len(room) && int(s.class) < len(frameLens)-1:
				s.class++
			case s.class > 0 && n < frameLens[s.class-1]/2:
				s.class--
			}
			f.end += n
			if err := s.put(f); err != nil {
				return total, err
			}
			total += int64(n)
		} else {
			s.c.bufs.putFrame(f)
		}
		if rerr != nil {
			return total, sourceError(rerr)
		}
	}
}

func sourceError(err error) error {
	if err == io.EOF {
		return nil
	}
	return &SourceError{err}
}
