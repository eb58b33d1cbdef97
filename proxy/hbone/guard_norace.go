//go:build !race

package hbone

func blind() {}
func see()   {}
