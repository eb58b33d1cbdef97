package hbone

// Has is how many tunnels there are for key now, and how many streams they carry.
func (p *Pool) Has(key Key) (tunnels, streams int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if ts := p.keys[key]; ts != nil {
		for _, t := range ts.list {
			tunnels, streams = tunnels+1, streams+t.active
		}
	}
	return tunnels, streams
}
