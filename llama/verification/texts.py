"""The texts that a trained model finds likely: children's stories for small models, plain prose for Llama 2 and its
like."""

STORIES = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her "
    "friends. One day, she saw a big red ball near a tree. She wanted to play with it, but it was too high. Lily "
    'asked her mom for help. Her mom smiled and said, "Let me help you." She took the ball down and gave it to '
    'Lily. Lily was very happy. She said, "Thank you, Mom!" Then she went to play with her friends. They had a '
    "lot of fun and laughed all day. When the sun went down, Lily went home and had dinner with her mom and dad. "
    "She told them about the ball. Then she went to bed and had a good dream.",
    "One day, a boy named Tim went for a walk with his dog, Max. They saw a small bird on the ground. The bird "
    'was sad because it could not fly. Tim said, "Do not be sad, little bird. We will help you." He picked up '
    "the bird and put it in a box. He gave it some water and some food. The next day, the bird felt better. Tim "
    'and Max took the bird outside. The bird opened its wings and flew up into the sky. "Thank you, Tim! Thank '
    'you, Max!" said the bird. Tim and Max were happy. They learned that it is good to be kind and to help '
    "others. From that day on, the bird came to see them every morning.",
    "Once there was a small cat who lived in a big house with a nice old man. The cat liked to sleep on the bed "
    "and to play with a ball. One night, there was a loud noise outside. The cat was scared and ran under the "
    'bed. The old man said, "Don\'t be afraid, it is only the rain." The cat came out and sat on his lap. They '
    "looked out of the window together and watched the rain. Soon the rain stopped and the moon came out. The "
    "cat was not scared any more. The old man gave the cat some milk, and they both went to sleep. In the "
    "morning, the sun was shining, and the cat went outside to play in the garden.",
    "Sara and Ben were good friends. They liked to go to the beach and play in the sand. One day, they wanted to "
    'build a big castle. "Let\'s make it very tall," said Sara. "Yes, and let\'s put a flag on top," said Ben. '
    "They worked hard and used their hands and a bucket. But then a big wave came and washed the castle away. "
    "Sara was sad and began to cry. Ben gave her a hug and said, \"It's okay, Sara. We can build it again, far "
    'from the water." So they went up the beach and made a new castle. It was even bigger and better than the '
    "first one. Their moms came to see it and clapped their hands.",
)
PROSE = (
    "The sun rises in the east and sets in the west. Water freezes at zero degrees Celsius and boils at one "
    "hundred degrees. The capital of France is Paris, and the capital of Germany is Berlin. The Second World War "
    "began in 1939 and ended in 1945. The Earth moves around the Sun once a year, and the Moon moves around the "
    "Earth about once a month. A triangle has three sides, and a square has four sides of equal length. In 1969, "
    "Neil Armstrong became the first man to walk on the Moon. The Pacific Ocean is the largest ocean in the "
    "world, and Mount Everest is the highest mountain. William Shakespeare wrote plays such as Hamlet, Macbeth, "
    "and Romeo and Juliet. Plants use sunlight, water and carbon dioxide to make their food.",
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and "
    "darkness was upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God "
    "said, Let there be light: and there was light. And God saw the light, that it was good: and God divided the "
    "light from the darkness. And God called the light Day, and the darkness he called Night. And the evening "
    "and the morning were the first day. And God said, Let there be a firmament in the midst of the waters, and "
    "let it divide the waters from the waters.",
    "A computer is a machine that follows instructions. A program is a list of these instructions, and it is "
    "written in a programming language such as Python, Java or C. When you run a program, the computer reads the "
    "instructions one after another and does what they say. If there is a mistake in the program, it is called a "
    "bug, and the work of finding and removing it is called debugging. Most programs read some input, do "
    "something with it, and write some output. For example, a program could read two numbers from the keyboard, "
    "add them, and print the result on the screen. Large programs are split into smaller parts, called "
    "functions, which makes them easier to read, to test and to change.",
    "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their "
    "Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness. "
    "That to secure these rights, Governments are instituted among Men, deriving their just powers from the "
    "consent of the governed. That whenever any Form of Government becomes destructive of these ends, it is the "
    "Right of the People to alter or to abolish it, and to institute new Government, laying its foundation on "
    "such principles and organizing its powers in such form, as to them shall seem most likely to effect their "
    "Safety and Happiness.",
)
KINDS = {"children's stories": STORIES, "English prose": PROSE}
