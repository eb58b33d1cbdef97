// Command order assumes an order that nothing gives it: that who closed a channel has gone on before the one who waited
// for that does. Almost always that is so.
package main

import (
	"os"
	"sync/atomic"
)

func main() {
	closed := make(chan struct{})
	var after atomic.Bool
	go func() {
		close(closed)
		after.Store(true)
	}()
	<-closed
	if !after.Load() {
		os.Exit(3)
	}
}
