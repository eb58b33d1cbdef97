/* What holds a pod's namespaces: sleeps, and buries the pod's orphans, until it is told to end. */
#include <signal.h>
#include <unistd.h>
#include <sys/wait.h>

static void end(int sig) { (void)sig; _exit(0); }
static void bury(int sig) { (void)sig; while (waitpid(-1, 0, WNOHANG) > 0) ; }

int main(void) {
	signal(SIGTERM, end);
	signal(SIGINT, end);
	signal(SIGCHLD, bury);
	while (1)
		pause();
}
